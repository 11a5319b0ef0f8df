#pragma once

#include <cmath>

#include "simd.h"

namespace carousel {

// out = x / rms(x) * weight, over `width` values, a multiple of 16. `out` may be `x`.
CAROUSEL_INLINE void rms_norm(const float* x, const float* weight, int64_t width, float epsilon, float* out) {
  f32v squares = {};
  for (int64_t i = 0; i < width; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
  const f32v scale = splat(1.0f / std::sqrt(sum_lanes(squares) / float(width) + epsilon));
  for (int64_t i = 0; i < width; i += kLanes) store(out + i, load(x + i) * scale * load(weight + i));
}

}  // namespace carousel
