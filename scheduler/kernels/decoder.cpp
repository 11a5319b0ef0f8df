#include "decoder.h"

#include "checks.h"
#include "norm.h"

namespace carousel {
namespace {

// Tokens written to the cache by one thread in a row: a block's cache lines then have one writer, mostly.
constexpr int64_t kTokensPerItem = 16;

void grow(std::vector<float>& buffer, int64_t size) {
  if (int64_t(buffer.size()) < size) buffer.resize(size);
}

void check_norm(const std::vector<float>& norm, int64_t size, const char* name) {
  require(int64_t(norm.size()) == size, name, " must have ", size, " weights");
}

void check_optional_norm(const std::vector<float>& norm, int64_t size, const char* name) {
  if (!norm.empty()) check_norm(norm, size, name);
}

std::span<const PackedWeights> one(const PackedWeights& weights) { return {&weights, 1}; }

}  // namespace

Decoder::Decoder(const DecoderConfig& config, const Matrix& embedding, PackedWeights head,
                 std::vector<float> final_norm, std::vector<RopeTable> ropes)
    : config_(config),
      embedding_(embedding),
      head_(std::move(head)),
      final_norm_(std::move(final_norm)),
      ropes_(std::move(ropes)) {
  const int64_t width = config.hidden_size;
  require(width > 0 && width % kMultiple == 0, "hidden_size must be a multiple of 16, not ", width);
  require(embedding.columns == width, "the embedding must have ", width, " columns");
  require(head_.in_features() == width, "lm_head must take ", width, " features");
  check_norm(final_norm_, width, "final_norm");
  packed_sampled_.add_forms_of(one(head_));
  for (const RopeTable& rope : ropes_)
    require(rope.rotary_dim > 0 && rope.rotary_dim % 2 == 0 && rope.rotary_dim <= config.head_dim,
            "a rope table's width must be even and at most ", config.head_dim);
}

void Decoder::add_layer(DecoderLayer layer) {
  const int64_t width = config_.hidden_size, intermediate = layer.down.in_features();
  const auto check_product = [&](std::span<const PackedWeights> weights, int64_t in, int64_t out, const char* name) {
    for (const PackedWeights& part : weights) {
      require(part.in_features() == in, name, " must take ", in, " features");
      out -= part.out_features();
    }
    require(out == 0, name, " has ", -out, " features too many");
  };
  check_product(layer.qkv, width, config_.qkv_width(), "qkv");
  check_product(one(layer.output), config_.query_width(), width, "output");
  check_product(one(layer.gate_up), width, intermediate, "gate_up");
  check_product(one(layer.down), intermediate, width, "down");
  require(layer.gate_up.gated(), "gate_up must be gated");
  if (!layers_.empty())
    require(layers_.front().down.in_features() == intermediate, "the layers of a decoder must be alike");
  check_norm(layer.attention_norm, width, "attention_norm");
  check_norm(layer.feed_forward_norm, width, "feed_forward_norm");
  check_optional_norm(layer.query_norm, config_.head_dim, "query_norm");
  check_optional_norm(layer.key_norm, config_.head_dim, "key_norm");
  check_optional_norm(layer.post_attention_norm, width, "post_attention_norm");
  check_optional_norm(layer.post_feed_forward_norm, width, "post_feed_forward_norm");
  require(layer.window >= 0, "a window must not be negative");
  require(layer.rope >= 0 && layer.rope < int64_t(ropes_.size()), "there is no rope table ", layer.rope);
  packed_normed_.add_forms_of(layer.qkv);
  packed_normed_.add_forms_of(one(layer.gate_up));
  packed_attended_.add_forms_of(one(layer.output));
  packed_gated_.add_forms_of(one(layer.down));
  layers_.push_back(std::move(layer));
}

void Decoder::forward(const DecoderStep& step, int threads) {
  check(step);
  const std::lock_guard<std::mutex> turn(in_use_);
  prepare(step, threads);
  parallel(threads, [&](Team& team) {
    embed(team, step);
    for (size_t i = 0; i < layers_.size(); ++i) {
      attend(team, layers_[i], (*step.caches)[i]);
      feed_forward(team, layers_[i]);
    }
    sample(team, step);
    read(team, step);
  });
}

void Decoder::check(const DecoderStep& step) const {
  require(!layers_.empty() && step.caches->size() == layers_.size(), "there are ", layers_.size(), " layers but ", step.caches->size(),
          " caches");
  const int64_t rows = step.batch().num_rows(), groups = int64_t(step.batches.size());
  const KvCache& first = step.caches->front().cache;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const auto& [cache, group] = (*step.caches)[i];
    require(cache.num_kv_heads == config_.num_kv_heads && cache.key_dim == config_.head_dim &&
                cache.value_dim == config_.head_dim, "the cache of layer ", i,
            " has the wrong shape");
    require(cache.num_blocks == first.num_blocks && cache.block_size == first.block_size,
            "all layers' caches must have the same blocks");
    require(group >= 0 && group < groups, "layer ", i, " is of group ", group, ", but there are block tables for ",
            groups);
  }
  check_geometry(first, config_.num_heads);
  for (int64_t group = 0; group < groups; ++group) {
    // Layers of a group differ in their windows only, so the widest covers what the others read.
    int64_t widest = 1;
    for (size_t i = 0; i < layers_.size() && widest > 0; ++i)
      if ((*step.caches)[i].group == group) widest = layers_[i].window == 0 ? 0 : std::max(widest, layers_[i].window);
    check_batch(step.batches[group], first, rows, widest);
  }
  for (const RopeTable& rope : ropes_)
    for (int64_t t = 0; t < rows; ++t)
      require(step.positions[t] >= 0 && step.positions[t] < rope.num_positions, "row ", t, ": a context up to position ",
              step.positions[t], " is longer than the rope table of ", rope.num_positions);
  for (int64_t t = 0; t < rows; ++t)
    require(step.tokens[t] >= 0 && step.tokens[t] < embedding_.rows, "token id ", step.tokens[t], " is not in [0, ",
            embedding_.rows, ")");
  for (int64_t i = 0; i < step.num_sampled; ++i)
    require(step.sampled_rows[i] >= 0 && step.sampled_rows[i] < rows, "there is no row ", step.sampled_rows[i],
            " to sample");
  for (int64_t i = 0; i < step.num_read; ++i)
    require(step.read_rows[i] >= 0 && step.read_rows[i] < rows, "there is no row ", step.read_rows[i], " to read");
}

void Decoder::prepare(const DecoderStep& step, int threads) {
  const PagedBatch& batch = step.batch();
  const KvCache& geometry = step.caches->front().cache;
  const int64_t rows = batch.num_rows(), intermediate = layers_.front().down.in_features();
  positions_.assign(step.positions, step.positions + rows);
  slots_.resize(step.batches.size());
  for (auto& slots : slots_) slots.resize(rows);
  for (int64_t s = 0; s < batch.num_sequences; ++s) {
    for (int64_t i = 0; i < batch.query_len(s); ++i) {
      const int64_t row = batch.query_start[s] + i, place = batch.first_position(s) + i;
      for (size_t group = 0; group < slots_.size(); ++group)
        slots_[group][row] =
            step.batches[group].blocks(s)[place / geometry.block_size] * geometry.block_size + place % geometry.block_size;
    }
  }
  sights_.clear();
  plans_.clear();
  for (size_t i = 0; i < layers_.size(); ++i) {
    const std::pair<int64_t, int64_t> sight(layers_[i].window, (*step.caches)[i].group);
    if (std::find(sights_.begin(), sights_.end(), sight) != sights_.end()) continue;
    sights_.push_back(sight);
    plans_.emplace_back(step.batches[sight.second], geometry, config_.num_heads, sight.first, 0, threads);
  }

  grow(hidden_, rows * config_.hidden_size);
  grow(update_, rows * config_.hidden_size);
  grow(qkv_, rows * config_.qkv_width());
  grow(attended_, rows * config_.query_width());
  grow(gated_, rows * intermediate);
  packed_normed_.reshape(rows, config_.hidden_size);
  packed_attended_.reshape(rows, config_.query_width());
  packed_gated_.reshape(rows, intermediate);
  packed_sampled_.reshape(step.num_sampled, config_.hidden_size);
  normed_.resize(threads);
  for (auto& row : normed_) row.resize(config_.hidden_size);
}

void Decoder::embed(Team& team, const DecoderStep& step) {
  const int64_t width = config_.hidden_size;
  team.for_each(step.batch().num_rows(), kTokensPerItem, [&](int64_t row) {
    float* const to = hidden(row);
    read_values(embedding_, step.tokens[row], to);
    for (int64_t i = 0; i < width; i += kLanes) store(to + i, load(to + i) * config_.embedding_multiplier);
  });
}

void Decoder::attend(Team& team, const DecoderLayer& layer, const LayerCache& at) {
  const int64_t qkv_width = config_.qkv_width(), query_width = config_.query_width(), head_dim = config_.head_dim;
  pack_normed(team, layer.attention_norm, layer.qkv);
  multiply(team, packed_normed_, layer.qkv, {qkv_.data(), qkv_width});

  const RopeTable& rope = ropes_[layer.rope];
  const std::vector<int64_t>& slots = slots_[at.group];
  team.for_each(int64_t(positions_.size()), kTokensPerItem, [&](int64_t row) {
    float* const query = qkv_.data() + row * qkv_width;
    float* const key = query + query_width;
    float* const value = key + config_.kv_width();
    const float* cos = rope.cos + positions_[row] * rope.rotary_dim;
    const float* sin = rope.sin + positions_[row] * rope.rotary_dim;
    for (float* head = query; head < value; head += head_dim) {
      const std::vector<float>& norm = head < key ? layer.query_norm : layer.key_norm;
      if (!norm.empty()) rms_norm(head, norm.data(), head_dim, config_.norm_epsilon, head);
      rotate(head, cos, sin, rope.rotary_dim);
    }
    write_slot(at.cache, slots[row], key, value);
  });

  const AttentionOptions options{config_.attention_scale, layer.window, 0, config_.attention_softcap};
  const AttentionRows rows{DType::f32, qkv_.data(), qkv_width, attended_.data(), query_width};
  plan(layer.window, at.group).run(team, at.cache, options, rows);
  pack_rows(team, packed_attended_, one(layer.output), [&](int64_t row) { return attended_.data() + row * query_width; });
  add_product(team, packed_attended_, layer.output, layer.post_attention_norm);
}

void Decoder::feed_forward(Team& team, const DecoderLayer& layer) {
  const int64_t width = layer.down.in_features();
  pack_normed(team, layer.feed_forward_norm, one(layer.gate_up));
  multiply(team, packed_normed_, one(layer.gate_up), {gated_.data(), width, false, config_.activation});
  pack_rows(team, packed_gated_, one(layer.down), [&](int64_t row) { return gated_.data() + row * width; });
  add_product(team, packed_gated_, layer.down, layer.post_feed_forward_norm);
}

void Decoder::sample(Team& team, const DecoderStep& step) {
  float* const scratch = normed_[team.rank()].data();
  pack_rows(team, packed_sampled_, one(head_), [&](int64_t i) {
    rms_norm(hidden(step.sampled_rows[i]), final_norm_.data(), config_.hidden_size, config_.norm_epsilon, scratch);
    return scratch;
  });
  multiply(team, packed_sampled_, one(head_), {step.logits, vocabulary()});
  if (config_.logit_softcap <= 0.0f) return;
  const float cap = config_.logit_softcap;
  team.for_each(step.num_sampled, 1, [&](int64_t i) {
    float* const logits = step.logits + i * vocabulary();
    int64_t n = 0;
    for (; n + kLanes <= vocabulary(); n += kLanes) store(logits + n, cap * tanh(load(logits + n) / cap));
    for (; n < vocabulary(); ++n) logits[n] = cap * tanh(splat(logits[n] / cap))[0];
  });
}

void Decoder::read(Team& team, const DecoderStep& step) {
  const int64_t width = config_.hidden_size;
  team.for_each(step.num_read, kTokensPerItem, [&](int64_t i) {
    rms_norm(hidden(step.read_rows[i]), final_norm_.data(), width, config_.norm_epsilon, step.states + i * width);
  });
}

// Packs the rows that fill(row) points to, as their readers want them.
template <class Fill>
void Decoder::pack_rows(Team& team, Operand& operand, std::span<const PackedWeights> readers, Fill&& fill) {
  team.for_each(operand.num_blocks(), 1, [&](int64_t b) {
    const PackedRows::Block block = operand.block(b);
    for (int64_t row = block.first; row < block.last; ++row) operand.pack(readers, block, row, fill(row));
  });
}

void Decoder::pack_normed(Team& team, const std::vector<float>& norm, std::span<const PackedWeights> readers) {
  float* const scratch = normed_[team.rank()].data();
  pack_rows(team, packed_normed_, readers, [&](int64_t row) {
    rms_norm(hidden(row), norm.data(), config_.hidden_size, config_.norm_epsilon, scratch);
    return scratch;
  });
}

// Adds a product to the residual stream, through a norm of its own in the families that have one.
void Decoder::add_product(Team& team, const Operand& rows, const PackedWeights& weights,
                          const std::vector<float>& post_norm) {
  const int64_t width = config_.hidden_size;
  if (post_norm.empty()) return multiply(team, rows, one(weights), {hidden_.data(), width, true});
  multiply(team, rows, one(weights), {update_.data(), width});
  team.for_each(rows.rows(), kTokensPerItem, [&](int64_t row) {
    float* const update = update_.data() + row * width;
    float* const to = hidden(row);
    rms_norm(update, post_norm.data(), width, config_.norm_epsilon, update);
    for (int64_t i = 0; i < width; i += kLanes) store(to + i, load(to + i) + load(update + i));
  });
}

AttentionPlan& Decoder::plan(int64_t window, int64_t group) {
  return plans_[std::find(sights_.begin(), sights_.end(), std::pair(window, group)) - sights_.begin()];
}

}  // namespace carousel
