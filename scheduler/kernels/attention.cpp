#include "attention.h"

#include "attention_tile.h"

namespace carousel {
namespace {

constexpr int64_t kItemRows = 48;      // query rows that share a walk over the context
constexpr int64_t kItemsPerThread = 8; // enough that threads finish together

int64_t tokens_per_item(int64_t group) { return std::max<int64_t>(1, kItemRows / group); }

template <class Stored>
void attend(int64_t rows, const PartitionView<Stored>& view, const float* queries, const Visible* visible,
            float softcap, float* scores, float* states) {
  switch (rows) {
    case 1: return attend_tile<1>(view, queries, visible, softcap, scores, states);
    case 2: return attend_tile<2>(view, queries, visible, softcap, scores, states);
    case 3: return attend_tile<3>(view, queries, visible, softcap, scores, states);
    case 4: return attend_tile<4>(view, queries, visible, softcap, scores, states);
    case 5: return attend_tile<5>(view, queries, visible, softcap, scores, states);
    case 6: return attend_tile<6>(view, queries, visible, softcap, scores, states);
  }
}

// Calls body(first, last) for each tile of an item's rows: as few tiles as possible, of nearly equal height.
template <class Body>
void for_each_tile(int64_t rows, Body&& body) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t i = 0; i < tiles; ++i) body(i * rows / tiles, (i + 1) * rows / tiles);
}

// Lays an item's queries out as its tiles read them, [head_dim, rows of the tile], times the scale.
template <class T>
void pack_queries(const T* from, int64_t row_stride, int64_t tokens, int64_t group, int64_t head_dim, float scale,
                  float* to) {
  for_each_tile(tokens * group, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const T* query = from + r / group * row_stride + r % group * head_dim;
      float* column = to + first * head_dim + (r - first);
      for (int64_t d = 0; d < head_dim; ++d) column[d * (last - first)] = to_float(query[d]) * scale;
    }
  });
}

// Lets a score that has no value take part in a row's softmax.
void add_sink(float sink, float* state, int64_t value_dim) {
  const float largest = RowState::largest(state) > sink ? RowState::largest(state) : sink;
  const float keep = exp(RowState::largest(state) - largest);
  RowState::sum(state) = RowState::sum(state) * keep + exp(sink - largest);
  float* const values = RowState::values(state);
  for (int64_t d = 0; d < value_dim; d += kLanes) store(values + d, load(values + d) * keep);
}

// `sinks`: of the group's heads, or null.
template <class T>
void write_outputs(float* states, int64_t tokens, int64_t group, int64_t value_dim, const float* sinks, T* to,
                   int64_t row_stride) {
  for (int64_t r = 0; r < tokens * group; ++r) {
    float* state = states + r * RowState::floats(value_dim);
    if (sinks != nullptr) add_sink(sinks[r % group], state, value_dim);
    T* out = to + r / group * row_stride + r % group * value_dim;
    const f32v sum = splat(RowState::sum(state));
    for (int64_t d = 0; d < value_dim; d += kLanes) store(out + d, load(RowState::values(state) + d) / sum);
  }
}

}  // namespace

AttentionPlan::AttentionPlan(const PagedBatch& batch, const KvCache& geometry, int64_t num_heads, int64_t window,
                             int64_t chunk, int threads)
    : batch_(batch),
      group_(num_heads / geometry.num_kv_heads),
      key_dim_(geometry.key_dim),
      value_dim_(geometry.value_dim),
      state_stride_(RowState::floats(geometry.value_dim)) {
  const int64_t step = tokens_per_item(group_);
  int64_t total = 0;
  for (int64_t s = 0; s < batch.num_sequences; ++s) {
    for (int64_t token = 0; token < batch.query_len(s); token += step) {
      const int64_t tokens = std::min(step, batch.query_len(s) - token);
      const int64_t position = batch.first_position(s) + token;
      const int64_t first = oldest_visible(position, window, chunk) / kPartition;
      const int64_t last = (position + tokens - 1) / kPartition + 1;
      for (int64_t head = 0; head < geometry.num_kv_heads; ++head)
        items_.push_back({s, head, batch.query_start[s] + token, tokens, position, first, last, -1});
      total += (last - first) * geometry.num_kv_heads;
    }
  }

  // An item that would keep one thread busy long after the others are done is divided along the context.
  const int64_t limit = std::max<int64_t>(1, total / (kItemsPerThread * threads));
  std::vector<Item> divided;
  int64_t num_partials = 0;
  for (const Item& whole : items_) {
    const int64_t partitions = whole.last_partition - whole.first_partition;
    if (threads == 1 || partitions <= limit) {
      divided.push_back(whole);
      continue;
    }
    Item piece = whole;
    piece.split = int64_t(splits_.size());
    const int64_t pieces = (partitions + limit - 1) / limit;
    for (int64_t i = 0; i < pieces; ++i) {
      piece.first_partition = whole.first_partition + i * partitions / pieces;
      piece.last_partition = whole.first_partition + (i + 1) * partitions / pieces;
      divided.push_back(piece);
    }
    splits_.push_back({whole.first_partition, whole.last_partition, pieces, num_partials * state_stride_});
    num_partials += partitions * whole.num_tokens * group_;
  }
  items_ = std::move(divided);

  unfinished_.reset(new std::atomic<int64_t>[splits_.size()]);
  for (size_t i = 0; i < splits_.size(); ++i) unfinished_[i] = splits_[i].num_items;
  partials_.resize(num_partials * state_stride_);
  const int64_t rows = step * group_;
  scratch_.resize(threads);
  for (Scratch& scratch : scratch_) {
    scratch.queries.resize(rows * key_dim_);
    scratch.scores.resize(kTileRows * kPartition);
    scratch.partial.resize(rows * state_stride_);
    scratch.state.resize(rows * state_stride_);
  }
}

void AttentionPlan::run(Team& team, const KvCache& cache, const AttentionOptions& options, const AttentionRows& rows) {
  team.for_each(int64_t(items_.size()), 1, [&](int64_t i) {
    if (cache.dtype == DType::f32) run_item<float>(items_[i], cache, options, rows, scratch_[team.rank()]);
    else run_item<bf16>(items_[i], cache, options, rows, scratch_[team.rank()]);
  });
}

template <class Stored>
void AttentionPlan::run_item(const Item& item, const KvCache& cache, const AttentionOptions& options,
                             const AttentionRows& rows, Scratch& scratch) {
  const int64_t num_rows = item.num_tokens * group_;
  const int64_t first_head = item.kv_head * group_;
  const int64_t from = item.first_row * rows.query_stride + first_head * key_dim_;
  const int64_t to = item.first_row * rows.output_stride + first_head * value_dim_;
  const float* sinks = options.sinks == nullptr ? nullptr : options.sinks + first_head;
  if (rows.dtype == DType::f32)
    pack_queries(static_cast<const float*>(rows.queries) + from, rows.query_stride, item.num_tokens, group_, key_dim_,
                 options.scale, scratch.queries.data());
  else
    pack_queries(static_cast<const bf16*>(rows.queries) + from, rows.query_stride, item.num_tokens, group_, key_dim_,
                 options.scale, scratch.queries.data());

  float* state = scratch.state.data();
  const auto clear = [&] {
    std::fill_n(state, num_rows * state_stride_, 0.0f);
    for (int64_t r = 0; r < num_rows; ++r) RowState::largest(state + r * state_stride_) = kNoKey;
  };
  const auto merge_all = [&](float* partials) {
    for (int64_t r = 0; r < num_rows; ++r) merge(state + r * state_stride_, partials + r * state_stride_, value_dim_);
  };

  if (item.split < 0) {
    clear();
    for (int64_t p = item.first_partition; p < item.last_partition; ++p) {
      run_partition<Stored>(item, p, cache, options, scratch, scratch.partial.data());
      merge_all(scratch.partial.data());
    }
  } else {
    const Split& split = splits_[item.split];
    const auto partials = [&](int64_t partition) {
      return partials_.data() + split.partials + (partition - split.first_partition) * num_rows * state_stride_;
    };
    for (int64_t p = item.first_partition; p < item.last_partition; ++p)
      run_partition<Stored>(item, p, cache, options, scratch, partials(p));
    if (unfinished_[item.split].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    unfinished_[item.split].store(split.num_items, std::memory_order_relaxed);  // for the next layer
    clear();
    for (int64_t p = split.first_partition; p < split.last_partition; ++p) merge_all(partials(p));
  }

  if (rows.dtype == DType::f32)
    write_outputs(state, item.num_tokens, group_, value_dim_, sinks, static_cast<float*>(rows.outputs) + to,
                  rows.output_stride);
  else
    write_outputs(state, item.num_tokens, group_, value_dim_, sinks, static_cast<bf16*>(rows.outputs) + to,
                  rows.output_stride);
}

template <class Stored>
void AttentionPlan::run_partition(const Item& item, int64_t partition, const KvCache& cache,
                                  const AttentionOptions& options, Scratch& scratch, float* partials) const {
  const int64_t start = partition * kPartition;
  const int64_t oldest = std::max(start, oldest_visible(item.first_position, options.window, options.chunk));
  const int64_t newest = std::min(start + kPartition, item.first_position + item.num_tokens) - 1;
  PartitionView<Stored> view{};
  view.values_are_keys = cache.values_are_keys;
  view.key_stride = cache.block_size;
  view.key_dim = key_dim_;
  view.value_dim = value_dim_;
  for (int64_t g = (oldest - start) / kGroup; g <= (newest - start) / kGroup; ++g) {
    const int64_t position = start + g * kGroup;
    const int64_t block = batch_.blocks(item.sequence)[position / cache.block_size];
    const int64_t offset = position % cache.block_size;
    view.keys[g] = static_cast<const Stored*>(cache.keys) + cache.key_offset(block, item.kv_head) + offset;
    view.values[g] = cache.values_are_keys ? view.keys[g]
                                           : static_cast<const Stored*>(cache.values) +
                                                 cache.value_offset(block, item.kv_head) + offset * value_dim_;
  }
  for_each_tile(item.num_tokens * group_, [&](int64_t first, int64_t last) {
    view.first_walk = first == 0;
    Visible visible[kTileRows];
    for (int64_t r = first; r < last; ++r) {
      const int64_t position = item.first_position + r / group_;
      const float slope = options.slopes == nullptr ? 0.0f : options.slopes[item.kv_head * group_ + r % group_];
      visible[r - first] = {std::max<int64_t>(0, oldest_visible(position, options.window, options.chunk) - start),
                            std::min(kPartition, position + 1 - start), position - start, slope};
    }
    attend(last - first, view, scratch.queries.data() + first * key_dim_, visible, options.softcap,
           scratch.scores.data(), partials + first * state_stride_);
  });
}

}  // namespace carousel
