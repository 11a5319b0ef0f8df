#include "rounding.h"

namespace carousel {
namespace {

// The smallest half-precision number that is not below x >= 0.
float half_above(float x) {
  const uint16_t nearest = to_half(x);
  return from_half(from_half(nearest) < x ? nearest + 1 : nearest);
}

void round_symmetric(const float* values, int64_t count, uint8_t* codes, float& scale) {
  constexpr float kSteps = 127.0f;  // -128 is left out
  scale = half_above(largest_magnitude(values, count) / kSteps);
  const float steps_per_unit = scale > 0.0f ? 1.0f / scale : 0.0f;
  for (int64_t k = 0; k < count; ++k) codes[k] = uint8_t(int32_t(values[k] * steps_per_unit + kRounder - kRounder) + 128);
}

constexpr int kInt4Group = int(kInt4.group);
constexpr float kTop = 15.0f;  // the largest code

struct Line {
  float scale, minimum;
};

// Rounds a group to the codes nearest to it on a line; returns the squared error.
CAROUSEL_INLINE float round_to_line(const float* values, Line line, float* codes) {
  const float steps_per_unit = line.scale > 0.0f ? 1.0f / line.scale : 0.0f;
  float error = 0.0f;
  for (int k = 0; k < kInt4Group; ++k) {
    const float step = std::min(kTop, std::max(0.0f, (values[k] - line.minimum) * steps_per_unit));
    codes[k] = step + kRounder - kRounder;
    const float off = values[k] - (line.minimum + line.scale * codes[k]);
    error += off * off;
  }
  return error;
}

// The line that fits given codes best, by least squares.
CAROUSEL_INLINE Line fit(const float* values, const float* codes, Line otherwise) {
  float sum_c = 0.0f, sum_cc = 0.0f, sum_v = 0.0f, sum_cv = 0.0f;
  for (int k = 0; k < kInt4Group; ++k) {
    sum_c += codes[k];
    sum_cc += codes[k] * codes[k];
    sum_v += values[k];
    sum_cv += codes[k] * values[k];
  }
  const float spread = kInt4Group * sum_cc - sum_c * sum_c;
  if (spread <= 0.0f) return otherwise;
  const float scale = (kInt4Group * sum_cv - sum_c * sum_v) / spread;
  return scale > 0.0f ? Line{scale, (sum_v - scale * sum_c) / kInt4Group} : otherwise;
}

Line as_stored(Line line) { return {from_half(to_half(line.scale)), from_half(to_half(line.minimum))}; }

void round_with_minimum(const float* values, uint8_t* codes, float& scale, float& minimum) {
  const auto [low, high] = std::minmax_element(values, values + kInt4Group);
  const Line whole{(*high - *low) / kTop, *low};
  Line best = as_stored(whole);
  float trial[kInt4Group], least = round_to_line(values, best, trial);
  for (int narrower = 0; narrower < 8; ++narrower) {
    const float cut = whole.scale * 0.25f * float(narrower);  // of the range, at both ends
    Line line{whole.scale - 2 * cut / kTop, whole.minimum + cut};
    round_to_line(values, line, trial);
    line = as_stored(fit(values, trial, line));
    const float error = round_to_line(values, line, trial);
    if (error < least) {
      least = error;
      best = line;
    }
  }
  round_to_line(values, best, trial);
  for (int k = 0; k < kInt4Group; ++k) codes[k] = uint8_t(trial[k]);
  scale = best.scale;
  minimum = best.minimum;
}

}  // namespace

void round_row(const float* values, int64_t columns, const Coding& coding, CodedRow& to) {
  to.reshape(coding, columns);
  for (int64_t g = 0; g < int64_t(to.scales.size()); ++g) {
    const int64_t first = g * coding.group, count = std::min(coding.group, columns - first);
    uint8_t* codes = &to.codes[first];
    if (!std::isfinite(largest_magnitude(values + first, count))) {
      std::fill_n(codes, count, uint8_t(0));
      to.scales[g] = std::numeric_limits<float>::quiet_NaN();
      continue;
    }
    if (!coding.minimums) {
      round_symmetric(values + first, count, codes, to.scales[g]);
      continue;
    }
    float group[kInt4Group];  // a last, short group is filled up with its own last number
    for (int64_t k = 0; k < coding.group; ++k) group[k] = values[first + std::min(k, count - 1)];
    round_with_minimum(group, codes, to.scales[g], to.minimums[g]);
  }
}

}  // namespace carousel
