#include "sampler.h"

#include <cmath>
#include <vector>

#include "simd.h"

namespace carousel {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr int64_t kStretch = 64;  // logits looked at together

// Sixteen logits from `from`, or what is left of them and -inf.
CAROUSEL_INLINE f32x16 load_logits(const float* from, int64_t left) {
  f32x16 logits = splat(kLowest);
  if (left >= kLanes) logits = load(from);
  else std::memcpy(&logits, from, left * sizeof(float));
  return logits == logits ? logits : splat(kLowest);
}

float largest_of(const float* logits, int64_t count) {
  f32x16 largest = splat(kLowest);
  for (int64_t i = 0; i < count; i += kLanes) largest = max(largest, load_logits(logits + i, count - i));
  return max_lanes(largest);
}

struct Candidate {
  float logit;
  int64_t index;
  bool operator<(const Candidate& other) const {  // comes before
    return logit > other.logit || (logit == other.logit && index < other.index);
  }
};

Candidate best_candidate(const float* logits, int64_t vocabulary) {
  Candidate best{kLowest, 0};
  for (int64_t start = 0; start < vocabulary; start += kStretch) {
    const int64_t end = std::min(start + kStretch, vocabulary);
    if (!(largest_of(logits + start, end - start) > best.logit)) continue;
    for (int64_t i = start; i < end; ++i)
      if (logits[i] > best.logit) best = {logits[i], i};
  }
  return best;
}

// Keeps up to twice the wanted number, so that cutting back to the best costs little for each logit let in.
std::vector<Candidate> best_candidates(const float* logits, int64_t vocabulary, int64_t count) {
  std::vector<Candidate> kept;
  kept.reserve(2 * count + kStretch);
  bool full = false;
  float least = kLowest;  // once full: what a logit must exceed to matter, since later ones lose ties
  const auto cut = [&] {
    std::nth_element(kept.begin(), kept.begin() + (count - 1), kept.end());
    kept.resize(count);
    least = kept.back().logit;
    full = true;
  };
  for (int64_t start = 0; start < vocabulary; start += kStretch) {
    const int64_t end = std::min(start + kStretch, vocabulary);
    if (full && !(largest_of(logits + start, end - start) > least)) continue;
    for (int64_t i = start; i < end; ++i) {
      const float logit = std::isnan(logits[i]) ? kLowest : logits[i];
      if (!full || logit > least) kept.push_back({logit, i});
    }
    if (int64_t(kept.size()) >= 2 * count) cut();
  }
  cut();
  std::sort(kept.begin(), kept.end());
  return kept;
}

// Stretch by stretch, each relative to the largest so far.
float log_sum_exp(const float* logits, int64_t vocabulary) {
  constexpr int64_t kLongStretch = 16 * kStretch;  // rescaling seldom
  float largest = kLowest;
  f32x16 sum = {};
  for (int64_t start = 0; start < vocabulary; start += kLongStretch) {
    const int64_t end = std::min(start + kLongStretch, vocabulary);
    const float here = largest_of(logits + start, end - start);
    if (here > largest) {
      sum *= exp(largest - here);
      largest = here;
    }
    if (largest == kLowest) continue;
    for (int64_t i = start; i < end; i += kLanes) sum += exp(load_logits(logits + i, end - i) - largest);
  }
  return largest + std::log(sum_lanes(sum));
}

}  // namespace

void largest_logits(Team& team, const Logits& logits, float* values, int64_t* indices) {
  team.for_each(logits.rows, 1, [&](int64_t row) {
    const Candidate best = best_candidate(logits.row(row), logits.vocabulary);
    values[row] = best.logit;
    indices[row] = best.index;
  });
}

void log_sum_exps(Team& team, const Logits& logits, float* sums) {
  team.for_each(logits.rows, 1, [&](int64_t row) { sums[row] = log_sum_exp(logits.row(row), logits.vocabulary); });
}

void top_candidates(Team& team, const Logits& logits, int64_t count, float* values, int64_t* indices) {
  team.for_each(logits.rows, 1, [&](int64_t row) {
    int64_t to = row * count;
    for (const Candidate& candidate : best_candidates(logits.row(row), logits.vocabulary, count)) {
      values[to] = candidate.logit;
      indices[to++] = candidate.index;
    }
  });
}

}  // namespace carousel
