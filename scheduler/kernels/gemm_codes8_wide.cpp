#include "gemm_kernels.h"

namespace carousel {

template Kernel kernel_of<Codes<8, 64>>(int64_t height);

}  // namespace carousel
