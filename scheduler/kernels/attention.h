// Paged attention: reads keys and values where they lie, in blocks scattered over the pool.
//
// Batch invariance. A sequence's context is cut into partitions of 256 tokens, aligned at its first token. Each
// partition gives a partial softmax, and the partials are merged in order, by the same code whether one thread
// walks all partitions or several threads share them. Within a partition each (token, head) row is summed in
// the order of positions, in its own accumulators. So a row's bits depend on its query and its context alone.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "kv_cache.h"
#include "threads.h"

namespace carousel {

struct AttentionOptions {
  float scale = 1.0f;
  int64_t window = 0;    // key j is visible to query i iff i - window < j <= i; 0: every j <= i
  int64_t chunk = 0;     // and iff it is in the same chunk of so many tokens; 0: there are none
  float softcap = 0.0f;  // scores become cap * tanh(score / cap); 0: they stay
  const float* sinks = nullptr;   // [num_heads]: a score each that takes part in the softmax and has no value
  const float* slopes = nullptr;  // [num_heads]: scores fall by so much with each token of distance (ALiBi)
};

// Queries and outputs: row t holds [num_heads, key_dim] or [num_heads, value_dim], and rows may lie further apart.
struct AttentionRows {
  DType dtype;
  const void* queries;
  int64_t query_stride;  // elements from row to row
  void* outputs;
  int64_t output_stride;
};

// How one batch's attention is divided among threads. Made once per forward pass, window and chunk, used by each layer.
class AttentionPlan {
 public:
  AttentionPlan(const PagedBatch& batch, const KvCache& geometry, int64_t num_heads, int64_t window, int64_t chunk,
                int threads);

  // Called by every thread of the team.
  void run(Team& team, const KvCache& cache, const AttentionOptions& options, const AttentionRows& rows);

 private:
  // Some query tokens of one sequence, all query heads of one KV head, some partitions of the context.
  struct Item {
    int64_t sequence, kv_head;
    int64_t first_row, num_tokens;  // in the packed batch
    int64_t first_position;         // of first_row in its sequence
    int64_t first_partition, last_partition;
    int64_t split;  // -1: this item has all partitions; else which of splits_
  };

  // A query tile whose partitions are shared by several items: the last to finish merges the partials.
  struct Split {
    int64_t first_partition, last_partition;
    int64_t num_items;
    int64_t partials;  // where they start in partials_
  };

  // What a thread works in.
  struct Scratch {
    std::vector<float> queries, scores, partial, state;
  };

  template <class Stored>
  void run_item(const Item& item, const KvCache& cache, const AttentionOptions& options, const AttentionRows& rows,
                Scratch& scratch);
  template <class Stored>
  void run_partition(const Item& item, int64_t partition, const KvCache& cache, const AttentionOptions& options,
                     Scratch& scratch, float* partials) const;

  PagedBatch batch_;
  int64_t group_;         // query heads to a KV head
  int64_t key_dim_, value_dim_;
  int64_t state_stride_;  // floats in the state of a row
  std::vector<Item> items_;
  std::vector<Split> splits_;
  std::unique_ptr<std::atomic<int64_t>[]> unfinished_;  // items to go, for each split
  std::vector<float> partials_;
  std::vector<Scratch> scratch_;  // for each thread
};

}  // namespace carousel
