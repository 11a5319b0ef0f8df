#include "gemm_kernels.h"

namespace carousel {

template Kernel kernel_of<Codes<5, 32>>(int64_t height);

}  // namespace carousel
