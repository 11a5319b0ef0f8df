// The paged KV cache: where a token's key and value lie, and how they get there.
//
// A layer's cache is a pool of blocks, and a sequence names its blocks in order in a block table.
//   keys   [num_blocks, num_kv_heads, key_dim, block_size]
//   values [num_blocks, num_kv_heads, block_size, value_dim]
// Keys are transposed within a block, so that the scores of sixteen tokens are one vector and need no
// horizontal sum; values are not, so that a weighted sum of values is one vector per sixteen dimensions. Where values are
// a part of the keys, as in latent attention, only the keys are stored.
#pragma once

#include <algorithm>

#include "simd.h"

namespace carousel {

struct KvCache {
  DType dtype = DType::f32;
  void* keys = nullptr;
  void* values = nullptr;
  int64_t num_blocks = 0;
  int64_t num_kv_heads = 0;
  int64_t key_dim = 0;
  int64_t value_dim = 0;
  int64_t block_size = 0;
  bool values_are_keys = false;  // the first value_dim numbers of the keys: then there are no values

  // The first element of one block of one head.
  int64_t key_offset(int64_t block, int64_t head) const { return (block * num_kv_heads + head) * key_dim * block_size; }
  int64_t value_offset(int64_t block, int64_t head) const {
    return (block * num_kv_heads + head) * value_dim * block_size;
  }
};

// The sequences of one packed batch. Sequence s owns the rows query_start[s] .. query_start[s + 1] - 1, its
// newest tokens, and holds context_lens[s] tokens with those.
struct PagedBatch {
  int64_t num_sequences;
  int64_t max_blocks;           // the width of block_tables
  const int32_t* block_tables;  // [num_sequences, max_blocks]
  const int32_t* query_start;   // [num_sequences + 1]
  const int32_t* context_lens;  // [num_sequences]

  int64_t num_rows() const { return query_start[num_sequences]; }
  int64_t query_len(int64_t s) const { return query_start[s + 1] - query_start[s]; }
  int64_t first_position(int64_t s) const { return context_lens[s] - query_len(s); }
  const int32_t* blocks(int64_t s) const { return block_tables + s * max_blocks; }
};

// The oldest position that the query at `position` sees: of the last `window` ones, and of its own chunk of `chunk`
// tokens, aligned at the sequence's first; 0: no such bound.
inline int64_t oldest_visible(int64_t position, int64_t window, int64_t chunk) {
  const int64_t of_window = window > 0 ? std::max<int64_t>(0, position - window + 1) : 0;
  return chunk > 0 ? std::max(of_window, position / chunk * chunk) : of_window;
}

// Turns the first rotary_dim dimensions of a head: dimension i with dimension i + rotary_dim / 2. A row of the
// tables holds one angle per dimension, as Transformers lays them out.
inline void rotate(float* head, const float* cos, const float* sin, int64_t rotary_dim) {
  const int64_t half = rotary_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cos[i] - b * sin[i];
    head[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}

// Writes one token's key and value, [num_kv_heads, key_dim] and [num_kv_heads, value_dim], to its slot: block * block_size + offset.
template <class In, class Stored>
inline void write_slot(const KvCache& cache, int64_t slot, const In* key, const In* value) {
  const int64_t block = slot / cache.block_size, offset = slot % cache.block_size;
  for (int64_t head = 0; head < cache.num_kv_heads; ++head) {
    Stored* to_key = static_cast<Stored*>(cache.keys) + cache.key_offset(block, head) + offset;
    Stored* to_value = static_cast<Stored*>(cache.values) + cache.value_offset(block, head) + offset * cache.value_dim;
    for (int64_t d = 0; d < cache.key_dim; ++d) assign(to_key[d * cache.block_size], to_float(key[d]));
    if (cache.values_are_keys) {
      key += cache.key_dim;
      continue;
    }
    for (int64_t d = 0; d < cache.value_dim; ++d) assign(to_value[d], to_float(value[d]));
    key += cache.key_dim;
    value += cache.value_dim;
  }
}

template <class In>
inline void write_slot(const KvCache& cache, int64_t slot, const In* key, const In* value) {
  if (cache.dtype == DType::f32) write_slot<In, float>(cache, slot, key, value);
  else write_slot<In, bf16>(cache, slot, key, value);
}

}  // namespace carousel
