// From numbers to codes: how weights are rounded once, at load, and rows at every step.
#pragma once

#include <cmath>

#include "matrix.h"

namespace carousel {

// int8: symmetric, in groups of 64. A channel or row shares its scale with 63 neighbours and not with its outliers:
// scales per whole row cost a small model three per cent of perplexity, these a fifth of that.
constexpr Coding kInt8{8, 64, false, 128, false};

// int4: with minimums, in groups of 32.
constexpr Coding kInt4{4, 32, true, 0, false};

// Rounds one row to kInt8 or kInt4.
//
// int8 takes the largest magnitude of a group as 127 steps. int4 looks for the scale and the minimum with the least
// squared error: from several ranges, each a little narrower than the group's own, it rounds, fits scale and minimum to
// those codes by least squares, and keeps the best, with scale and minimum as they will be stored. A group with a number
// that is not finite has NaN for its scale, so that every product with it is a NaN.
void round_row(const float* values, int64_t columns, const Coding& coding, CodedRow& to);

// The largest magnitude among `count` values; NaN if one of them is. Magnitudes are in the order of their bits, in which
// a NaN is the largest, where a comparison of floats would pass it over.
CAROUSEL_INLINE float largest_magnitude(const float* values, int64_t count) {
  const auto larger = [](i32v a, i32v b) { return a > b ? a : b; };
  i32v largest = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) largest = larger((i32v)abs(load(values + i)), largest);
  int32_t result = reduce(largest, larger);
  for (; i < count; ++i) result = std::max(result, std::bit_cast<int32_t>(std::abs(values[i])));
  return std::bit_cast<float>(result);
}

CAROUSEL_INLINE i32v round_to_int(f32v values, float steps_per_unit) {
  return (i32v)fma(values, splat(steps_per_unit), splat(kRounder)) - std::bit_cast<int32_t>(kRounder);
}

}  // namespace carousel
