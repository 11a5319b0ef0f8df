#include "gemm_kernels.h"

namespace carousel {

template Kernel kernel_of<Codes<6, 16>>(int64_t height);

}  // namespace carousel
