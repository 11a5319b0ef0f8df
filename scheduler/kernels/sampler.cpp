#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "simd.h"

namespace carousel {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr int64_t kStretch = 64;  // logits looked at together

// A vector of logits from `from`, or what is left of them and -inf.
CAROUSEL_INLINE f32v load_logits(const float* from, int64_t left) {
  f32v logits = splat(kLowest);
  if (left >= kLanes) logits = load(from);
  else std::memcpy(&logits, from, left * sizeof(float));
  return logits == logits ? logits : splat(kLowest);
}

float largest_of(const float* logits, int64_t count) {
  f32v largest = splat(kLowest);
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

bool has_nan(const float* logits, int64_t vocabulary) {
  i32v seen = {};
  int64_t i = 0;
  for (; i + kLanes <= vocabulary; i += kLanes) {
    const f32v here = load(logits + i);
    seen |= here != here;
  }
  for (; i < vocabulary; ++i) seen[0] |= -int32_t(std::isnan(logits[i]));
  int32_t any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= seen[lane];
  return any != 0;
}

constexpr int64_t kLongStretch = 16 * kStretch;  // exponentials summed in float; their sums are summed in double

// e to the logits over the temperature, relative to the largest: the sum of each long stretch, and of all.
struct Exponentials {
  const float* logits;
  int64_t vocabulary;
  float largest, scale;
  std::vector<double> sums;
  double total = 0;

  Exponentials(const float* row, int64_t size, float temperature)
      : logits(row), vocabulary(size), largest(largest_of(row, size)), scale(1.0f / temperature) {
    if (largest == kLowest) return;
    for (int64_t start = 0; start < vocabulary; start += kLongStretch) {
      const int64_t end = std::min(start + kLongStretch, vocabulary);
      f32v sum = {};
      for (int64_t i = start; i < end; i += kLanes) sum += at(i, end);
      total += sums.emplace_back(sum_lanes(sum));
    }
  }

  f32v at(int64_t i, int64_t end) const { return exp((load_logits(logits + i, end - i) - largest) * scale); }

  int64_t token_at(double target) const {
    size_t stretch = 0;
    for (; stretch + 1 < sums.size() && sums[stretch] <= target; ++stretch) target -= sums[stretch];
    int64_t likely = 0;  // should rounding carry the target past the stretch, its last possible token
    const int64_t start = int64_t(stretch) * kLongStretch, end = std::min(start + kLongStretch, vocabulary);
    for (int64_t i = start; i < end; i += kLanes) {
      const f32v here = at(i, end);
      for (int64_t lane = 0; lane < std::min<int64_t>(kLanes, end - i); ++lane) {
        if (here[lane] == 0) continue;
        likely = i + lane;
        target -= here[lane];
        if (target < 0) return likely;
      }
    }
    return likely;
  }
};

struct Weighted {
  Candidate candidate;
  double weight;  // e to the logit over the temperature, relative to the likeliest's
  bool operator<(const Weighted& other) const { return candidate < other.candidate; }
};

double sum_of(const std::vector<Weighted>& tokens, size_t begin, size_t end) {
  double sum = 0;
  for (size_t i = begin; i < end; ++i) sum += tokens[i].weight;
  return sum;
}

// Moves the likeliest tokens whose weights sum to `mass` to the front, and returns how many they are: at least one.
size_t take_mass(std::vector<Weighted>& tokens, double mass) {
  size_t begin = 0, end = tokens.size();
  double before = 0;
  while (end - begin > 32) {
    const size_t middle = (begin + end) / 2;
    std::nth_element(tokens.begin() + begin, tokens.begin() + middle, tokens.begin() + end);
    const double half = sum_of(tokens, begin, middle);
    if (before + half >= mass) {
      end = middle;
    } else {
      before += half;
      begin = middle;
    }
  }
  std::sort(tokens.begin() + begin, tokens.begin() + end);
  while (begin < end && before < mass) before += tokens[begin++].weight;
  return std::max<size_t>(begin, 1);
}

// Where the number falls among the tokens that are left, the likeliest first.
int64_t pick(std::vector<Weighted>& tokens, double min_p, double number) {
  const int64_t any = tokens.front().candidate.index;  // where no weight is a number
  std::erase_if(tokens, [&](const Weighted& token) { return !(token.weight >= min_p) || token.weight == 0; });
  if (tokens.empty()) return any;
  const double target = number * sum_of(tokens, 0, tokens.size());
  // The first token with which the sum exceeds the target.
  const double beyond = std::nextafter(target, std::numeric_limits<double>::infinity());
  return tokens[take_mass(tokens, beyond) - 1].candidate.index;
}

constexpr int64_t kFew = 256;  // candidates that mostly are enough

int64_t draw_row(const float* logits, int64_t vocabulary, float temperature, int64_t top_k, double top_p, double min_p,
                 double number) {
  const Exponentials exponentials(logits, vocabulary, temperature);
  const double scale = 1.0 / temperature;
  const bool counted = top_k > 0 && top_k < vocabulary;
  std::vector<Weighted> tokens;
  const auto weigh = [&](const Candidate& candidate) {
    tokens.push_back({candidate, std::exp((double(candidate.logit) - exponentials.largest) * scale)});
  };
  if (!counted || top_k <= kFew) {
    const int64_t count = std::min(counted ? top_k : kFew, vocabulary);
    for (const Candidate& candidate : best_candidates(logits, vocabulary, count)) weigh(candidate);
    const double found = sum_of(tokens, 0, tokens.size());
    const double mass = top_p * (counted ? found : exponentials.total);
    const bool enough = counted || count == vocabulary || (top_p < 1.0 && found >= mass) ||
                        tokens.back().weight < min_p;
    if (enough) {
      if (top_p < 1.0) tokens.resize(take_mass(tokens, mass));
      return pick(tokens, min_p, number);
    }
    tokens.clear();
  }
  tokens.reserve(vocabulary);
  for (int64_t i = 0; i < vocabulary; ++i) weigh({std::isnan(logits[i]) ? kLowest : logits[i], i});
  if (counted) {
    std::nth_element(tokens.begin(), tokens.begin() + (top_k - 1), tokens.end());
    tokens.resize(top_k);
  }
  const double mass = top_p * (counted ? sum_of(tokens, 0, tokens.size()) : exponentials.total);
  if (top_p < 1.0) tokens.resize(take_mass(tokens, mass));
  return pick(tokens, min_p, number);
}

}  // namespace

void largest_logits(Team& team, const Logits& logits, float* values, int64_t* indices) {
  team.for_each(logits.rows, 1, [&](int64_t row) {
    const Candidate best = best_candidate(logits.row(row), logits.vocabulary);
    values[row] = has_nan(logits.row(row), logits.vocabulary) ? std::numeric_limits<float>::quiet_NaN() : best.logit;
    indices[row] = best.index;
  });
}

void log_sum_exps(Team& team, const Logits& logits, const float* temperatures, float* sums) {
  team.for_each(logits.rows, 1, [&](int64_t row) {
    const Exponentials exponentials(logits.row(row), logits.vocabulary, temperatures[row]);
    sums[row] = float(exponentials.largest * double(exponentials.scale) + std::log(exponentials.total));
  });
}

void draw(Team& team, const Logits& logits, const float* temperatures, const double* numbers, int64_t* tokens) {
  team.for_each(logits.rows, 1, [&](int64_t row) {
    const Exponentials exponentials(logits.row(row), logits.vocabulary, temperatures[row]);
    tokens[row] = exponentials.token_at(numbers[row] * exponentials.total);
  });
}

void draw_truncated(Team& team, const Logits& logits, const float* temperatures, const Truncation& truncation,
                    const double* numbers, int64_t* tokens) {
  team.for_each(logits.rows, 1, [&](int64_t row) {
    tokens[row] = draw_row(logits.row(row), logits.vocabulary, temperatures[row], truncation.top_k[row],
                           truncation.top_p[row], truncation.min_p[row], numbers[row]);
  });
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
