#include "gemm_kernels.h"

namespace carousel {

template Kernel kernel_of<Numbers<Mode::f32>>(int64_t height);
template Kernel kernel_of<Numbers<Mode::bf16>>(int64_t height);

}  // namespace carousel
