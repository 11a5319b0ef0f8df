// What is checked at the boundary of a step, so that the kernels behind may trust their input.
#pragma once

#include "kv_cache.h"
#include "require.h"

namespace carousel {

inline void check_geometry(const KvCache& cache, int64_t num_heads) {
  require(cache.block_size > 0 && cache.block_size % kMultiple == 0, "block_size must be a multiple of 16, not ",
          cache.block_size);
  for (const int64_t size : {cache.key_dim, cache.value_dim})
    require(size > 0 && size % kMultiple == 0, "head_dim must be a multiple of 16, not ", size);
  require(cache.num_kv_heads > 0 && num_heads > 0 && num_heads % cache.num_kv_heads == 0, num_heads,
          " query heads cannot share ", cache.num_kv_heads, " KV heads");
}

// Checks that rows, lengths and the block ids that will be read are in range. A positive window or chunk excuses the
// blocks that no query sees any more.
inline void check_batch(const PagedBatch& batch, const KvCache& cache, int64_t num_rows, int64_t window,
                        int64_t chunk = 0) {
  require(batch.query_start[0] == 0, "query_start must begin with 0");
  for (int64_t s = 0; s < batch.num_sequences; ++s) {
    const int64_t context = batch.context_lens[s];
    require(batch.query_len(s) >= 0, "query_start decreases at sequence ", s);
    require(batch.first_position(s) >= 0, "sequence ", s, " has ", batch.query_len(s), " new tokens but a context of ",
            context);
    require(context <= batch.max_blocks * cache.block_size, "sequence ", s, ": a context of ", context,
            " does not fit its block table");
    if (batch.query_len(s) == 0) continue;
    const int64_t oldest = oldest_visible(batch.first_position(s), window, chunk);
    for (int64_t b = oldest / cache.block_size; b * cache.block_size < context; ++b) {
      const int64_t block = batch.blocks(s)[b];
      require(block >= 0 && block < cache.num_blocks, "sequence ", s, ": block id ", block, " is not in [0, ",
              cache.num_blocks, ")");
    }
  }
  require(batch.num_rows() == num_rows, "query_start ends at ", batch.num_rows(), " but there are ", num_rows,
          " rows");
}

}  // namespace carousel
