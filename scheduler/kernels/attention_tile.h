// The arithmetic of attention: a tile of one to six query rows against one partition of keys and values.
//
// The rows of a tile share every loaded key and value vector, and nothing else: each row has accumulators of its
// own, so the tile a row falls into does not change its result.
#pragma once

#include "simd.h"

namespace carousel {

constexpr int64_t kPartition = 256;  // tokens of context to a partition
constexpr int64_t kGroup = kLanes;   // tokens whose scores make one vector; a group lies within one block
constexpr int kTileRows = 6;
#if defined(__AVX512F__)
constexpr int kTileSums = 24;  // vectors that are summed at once, of 32 registers
#else
constexpr int kTileSums = 12;  // of 16
#endif

// How many vectors of scores or of values a tile of so many rows sums at once.
constexpr int vectors_at_once(int rows) { return rows * 4 <= kTileSums ? 4 : 2; }

// A row's softmax so far, over some keys: their largest score, the sum of e^(score - largest), and after a
// vector's worth of header the sum of values so weighted. No key yet: the largest score is -inf.
struct RowState {
  static constexpr int64_t kHeader = kLanes;
  static int64_t floats(int64_t value_dim) { return kHeader + value_dim; }
  static float& largest(float* state) { return state[0]; }
  static float& sum(float* state) { return state[1]; }
  static float* values(float* state) { return state + kHeader; }
};

constexpr float kNoKey = -std::numeric_limits<float>::infinity();

// Adds a partition's softmax to the state before it. Not inlined: both ways to walk the partitions, by one thread
// or by several, must round alike.
__attribute__((noinline)) inline void merge(float* state, float* partial, int64_t value_dim) {
  if (RowState::sum(partial) == 0.0f) return;  // no key; not known by the largest score, which passes over a NaN
  const float largest = RowState::largest(state) > RowState::largest(partial) ? RowState::largest(state)
                                                                               : RowState::largest(partial);
  const f32v keep = exp(splat(RowState::largest(state) - largest));
  const f32v take = exp(splat(RowState::largest(partial) - largest));
  RowState::largest(state) = largest;
  RowState::sum(state) = RowState::sum(state) * keep[0] + RowState::sum(partial) * take[0];
  float* into = RowState::values(state);
  const float* from = RowState::values(partial);
  for (int64_t d = 0; d < value_dim; d += kLanes)
    store(into + d, fma(load(into + d), keep, load(from + d) * take));
}

// scores[row, group, lane] = queries[:, row] . keys[group][:, lane], for kGroups groups of sixteen keys. Blocks are
// scattered, so the hardware cannot guess the next ones: on the way, `first_walk` asks for the keys of the groups that
// follow and for these groups' values.
template <int kRows, int kGroups, class Stored>
CAROUSEL_INLINE void score_groups(const float* queries, const Stored* const* keys, const Stored* const* values,
                                  int64_t key_stride, int64_t key_dim, bool first_walk, float* scores) {
  constexpr int64_t kPerLine = 64 / sizeof(Stored) / kMultiple;  // rows of the smallest block to a cache line
  f32v sums[kRows][kGroups];
  unrolled<kRows>(CAROUSEL_EACH(r) { unrolled<kGroups>(CAROUSEL_EACH(g) { sums[r][g] = f32v{}; }); });
  const int64_t ask = first_walk ? 0 : -1;
  for (int64_t d = 0; d < key_dim; ++d) {
    if (d % kPerLine == ask)
      unrolled<kGroups>(CAROUSEL_EACH(g) {
        __builtin_prefetch(keys[g + kGroups] + d * key_stride);
        __builtin_prefetch(values[g] + d * kLanes);
      });
    f32v key[kGroups];
    unrolled<kGroups>(CAROUSEL_EACH(g) { key[g] = load(keys[g] + d * key_stride); });
    unrolled<kRows>(CAROUSEL_EACH(r) {
      const f32v query = splat(queries[d * kRows + r]);
      unrolled<kGroups>(CAROUSEL_EACH(g) { sums[r][g] = fma(query, key[g], sums[r][g]); });
    });
  }
  unrolled<kRows>(CAROUSEL_EACH(r) {
    unrolled<kGroups>(CAROUSEL_EACH(g) { store(scores + r * kPartition + g * kGroup, sums[r][g]); });
  });
}

// out[row, :] = sum of weights[row, key] * values[key, :] over keys [begin, end) of the partition, in their order,
// for kVectors vectors of dimensions.
template <int kRows, int kVectors, class Stored>
CAROUSEL_INLINE void weigh_values(const float* weights, const Stored* const* values, int64_t begin, int64_t end,
                                  int64_t value_dim, float* out, int64_t out_stride) {
  f32v sums[kRows][kVectors];
  unrolled<kRows>(CAROUSEL_EACH(r) { unrolled<kVectors>(CAROUSEL_EACH(v) { sums[r][v] = f32v{}; }); });
  for (int64_t key = begin; key < end;) {
    const Stored* value = values[key / kGroup] + key % kGroup * value_dim;
    const int64_t stop = end < (key / kGroup + 1) * kGroup ? end : (key / kGroup + 1) * kGroup;
    for (; key < stop; ++key, value += value_dim) {
      f32v part[kVectors];
      unrolled<kVectors>(CAROUSEL_EACH(v) { part[v] = load(value + v * kLanes); });
      unrolled<kRows>(CAROUSEL_EACH(r) {
        const f32v weight = splat(weights[r * kPartition + key]);
        unrolled<kVectors>(CAROUSEL_EACH(v) { sums[r][v] = fma(weight, part[v], sums[r][v]); });
      });
    }
  }
  unrolled<kRows>(CAROUSEL_EACH(r) {
    unrolled<kVectors>(CAROUSEL_EACH(v) { store(out + r * out_stride + v * kLanes, sums[r][v]); });
  });
}

// out[row, d] = sum of weights[row, key] * keys[d, key] over the groups of the partition, for kDims dimensions: of keys
// whose first dimensions are the values too. Each lane adds up its own keys, and the lanes are added at the end. Keys
// outside [begin, end) may be anything.
template <int kRows, int kDims, class Stored>
CAROUSEL_INLINE void weigh_keys(const float* weights, const Stored* const* keys, int64_t key_stride, int64_t dim,
                                int64_t begin, int64_t end, float* out, int64_t out_stride) {
  f32v sums[kRows][kDims];
  unrolled<kRows>(CAROUSEL_EACH(r) { unrolled<kDims>(CAROUSEL_EACH(d) { sums[r][d] = f32v{}; }); });
  for (int64_t g = begin / kGroup; g * kGroup < end; ++g) {
    const i32v key = lane_index() + int32_t(g * kGroup);
    const auto known = (key >= int32_t(begin)) & (key < int32_t(end));
    f32v part[kDims];
    unrolled<kDims>(CAROUSEL_EACH(d) { part[d] = known ? load(keys[g] + (dim + d) * key_stride) : f32v{}; });
    unrolled<kRows>(CAROUSEL_EACH(r) {
      const f32v weight = load(weights + r * kPartition + g * kGroup);
      unrolled<kDims>(CAROUSEL_EACH(d) { sums[r][d] = fma(weight, part[d], sums[r][d]); });
    });
  }
  unrolled<kRows>(CAROUSEL_EACH(r) {
    unrolled<kDims>(CAROUSEL_EACH(d) { out[r * out_stride + dim + d] = sum_lanes(sums[r][d]); });
  });
}

// What one row sees of a partition, in places counted from the partition's first key.
struct Visible {
  int64_t begin, end;  // its keys
  int64_t query;       // its own place
  float slope;         // by how much scores fall with each token of distance
};

// Turns one row's scores of groups [first, last) into softmax weights, relative to the row's largest score. Keys
// that it does not see weigh exactly nothing, whatever their slots hold.
CAROUSEL_INLINE void weigh_scores(float* scores, int64_t first, int64_t last, const Visible& visible, float softcap,
                                  float* state) {
  f32v largest = splat(kNoKey);
  for (int64_t g = first; g < last; ++g) {
    f32v s = load(scores + g * kGroup);
    if (softcap > 0.0f) s = softcap * tanh(s / softcap);
    const i32v key = lane_index() + int32_t(g * kGroup);
    if (visible.slope != 0.0f)
      s = fma(__builtin_convertvector(key - int32_t(visible.query), f32v), splat(visible.slope), s);
    s = ((key >= int32_t(visible.begin)) & (key < int32_t(visible.end))) ? s : splat(kNoKey);
    store(scores + g * kGroup, s);
    largest = max(largest, s);
  }
  const float peak = max_lanes(largest);
  const float shift = peak == kNoKey ? 0.0f : peak;  // a row that sees no key here must not meet -inf - -inf
  f32v sum = {};
  for (int64_t g = first; g < last; ++g) {
    const f32v weight = exp(load(scores + g * kGroup) - shift);
    store(scores + g * kGroup, weight);
    sum += weight;
  }
  RowState::largest(state) = peak;
  RowState::sum(state) = sum_lanes(sum);
}

// One partition as a tile of rows sees it.
template <class Stored>
struct PartitionView {
  const Stored* keys[kPartition / kGroup + 4];  // [key_dim, kGroup], rows key_stride apart
  const Stored* values[kPartition / kGroup];    // [kGroup, value_dim]
  bool values_are_keys;                         // the first value_dim dimensions of the keys
  int64_t key_stride;
  int64_t key_dim, value_dim;
  bool first_walk;  // no tile has read this partition just before
};

// Fills the states of a tile's rows. queries: [key_dim, kRows], already scaled.
template <int kRows, class Stored>
void attend_tile(const PartitionView<Stored>& view, const float* queries, const Visible* visible, float softcap,
                 float* scores, float* states) {
  const int64_t stride = RowState::floats(view.value_dim);
  const int64_t begin = visible[0].begin, end = visible[kRows - 1].end;
  if (begin >= end) {
    for (int r = 0; r < kRows; ++r) RowState::sum(states + r * stride) = 0.0f;
    return;
  }
  constexpr int kAtOnce = vectors_at_once(kRows);
  const int64_t first = begin / kGroup, last = (end + kGroup - 1) / kGroup;
  int64_t g = first;
  for (; g + kAtOnce <= last; g += kAtOnce)
    score_groups<kRows, kAtOnce>(queries, view.keys + g, view.values + g, view.key_stride, view.key_dim,
                                 view.first_walk, scores + g * kGroup);
  for (; g < last; ++g)
    score_groups<kRows, 1>(queries, view.keys + g, view.values + g, view.key_stride, view.key_dim, view.first_walk,
                           scores + g * kGroup);
  for (int r = 0; r < kRows; ++r)
    weigh_scores(scores + r * kPartition, first, last, visible[r], softcap, states + r * stride);

  if (view.values_are_keys) {
    for (int64_t d = 0; d < view.value_dim; d += kAtOnce)  // a multiple of sixteen
      weigh_keys<kRows, kAtOnce>(scores, view.keys, view.key_stride, d, begin, end, RowState::values(states), stride);
    return;
  }
  const Stored* values[kPartition / kGroup];
  for (int64_t d = 0; d < view.value_dim;) {
    for (g = first; g < last; ++g) values[g] = view.values[g] + d;
    float* out = RowState::values(states) + d;
    if (d + kAtOnce * kLanes <= view.value_dim) {
      weigh_values<kRows, kAtOnce>(scores, values, begin, end, view.value_dim, out, stride);
      d += kAtOnce * kLanes;
    } else {
      weigh_values<kRows, 1>(scores, values, begin, end, view.value_dim, out, stride);
      d += kLanes;
    }
  }
}

}  // namespace carousel
