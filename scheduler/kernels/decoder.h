// A whole forward pass of the Llama family in one call: Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3.
//
// The residual stream and everything between products is float, whatever the mode of the products.
#pragma once

#include <mutex>
#include <vector>

#include "attention.h"
#include "gemm.h"

namespace carousel {

// The angles of rotary positions: row p of `cos` and `sin` holds those of position p. Borrowed.
struct RopeTable {
  const float* cos;
  const float* sin;
  int64_t num_positions, rotary_dim;
};

struct DecoderConfig {
  int64_t hidden_size;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  float norm_epsilon;
  float attention_scale;
  float attention_softcap;     // 0: none
  float logit_softcap;         // 0: none
  float embedding_multiplier;  // Gemma scales embeddings by sqrt(hidden_size)
  Activation activation;

  int64_t query_width() const { return num_heads * head_dim; }
  int64_t kv_width() const { return num_kv_heads * head_dim; }
  int64_t qkv_width() const { return query_width() + 2 * kv_width(); }
};

// The layers of a decoder are of the same shapes. A norm that the family does not have is left empty.
struct DecoderLayer {
  std::vector<PackedWeights> qkv;  // queries, keys and values, stacked; several where they are stored differently
  PackedWeights output;
  PackedWeights gate_up;  // gated
  PackedWeights down;
  std::vector<float> attention_norm;          // [hidden_size]
  std::vector<float> feed_forward_norm;       // [hidden_size]
  std::vector<float> query_norm;              // [head_dim]
  std::vector<float> key_norm;                // [head_dim]
  std::vector<float> post_attention_norm;     // [hidden_size]
  std::vector<float> post_feed_forward_norm;  // [hidden_size]
  int64_t window;                             // 0: full attention
  int64_t rope;                               // which of the decoder's tables
};

// Where one layer keeps its keys and values. Layers of different windows may share the tensors, by different blocks.
struct LayerCache {
  KvCache cache;
  int64_t group;  // whose block tables name the blocks
};

// One packed batch: what to compute and where to put it.
struct DecoderStep {
  const int32_t* tokens;     // [batch().num_rows()]
  const int64_t* positions;  // [batch().num_rows()]: for rotary embeddings
  std::vector<PagedBatch> batches;        // for each group of layers; they differ in their block tables only
  const std::vector<LayerCache>* caches;  // for each layer
  const int32_t* sampled_rows;         // [num_sampled]: the rows whose logits are wanted
  int64_t num_sampled;
  float* logits;  // [num_sampled, vocabulary]
  const int32_t* read_rows;  // [num_read]: the rows whose last hidden states are wanted
  int64_t num_read;
  float* states;  // [num_read, hidden_size], after the final norm

  const PagedBatch& batch() const { return batches.front(); }
};

class Decoder {
 public:
  // `embedding` is borrowed.
  Decoder(const DecoderConfig& config, const Matrix& embedding, PackedWeights head, std::vector<float> final_norm,
          std::vector<RopeTable> ropes);
  void add_layer(DecoderLayer layer);

  const DecoderConfig& config() const { return config_; }
  int64_t num_layers() const { return int64_t(layers_.size()); }
  int64_t vocabulary() const { return head_.out_features(); }

  // Throws std::invalid_argument where the step is not sound. Calls from several threads take turns.
  void forward(const DecoderStep& step, int threads);

 private:
  void check(const DecoderStep& step) const;
  void prepare(const DecoderStep& step, int threads);

  // Phases. Every thread of the team calls them.
  void embed(Team& team, const DecoderStep& step);
  void attend(Team& team, const DecoderLayer& layer, const LayerCache& at);
  void feed_forward(Team& team, const DecoderLayer& layer);
  void sample(Team& team, const DecoderStep& step);
  void read(Team& team, const DecoderStep& step);

  template <class Fill>
  void pack_rows(Team& team, Operand& operand, std::span<const PackedWeights> readers, Fill&& fill);
  void pack_normed(Team& team, const std::vector<float>& norm, std::span<const PackedWeights> readers);
  void add_product(Team& team, const Operand& rows, const PackedWeights& weights,
                   const std::vector<float>& post_norm);

  float* hidden(int64_t row) { return hidden_.data() + row * config_.hidden_size; }
  AttentionPlan& plan(int64_t window, int64_t group);

  const DecoderConfig config_;
  const Matrix embedding_;
  const PackedWeights head_;
  const std::vector<float> final_norm_;
  const std::vector<RopeTable> ropes_;
  std::vector<DecoderLayer> layers_;

  // What one step works in, kept from step to step.
  std::mutex in_use_;
  std::vector<int64_t> positions_;           // of each row
  std::vector<std::vector<int64_t>> slots_;  // for each group of layers, of each row
  std::vector<std::pair<int64_t, int64_t>> sights_;  // the layers' different windows and groups
  std::vector<AttentionPlan> plans_;                 // for each of sights_
  std::vector<float> hidden_;               // the residual stream [rows, hidden_size]
  std::vector<float> update_;               // a product that a norm waits for [rows, hidden_size]
  std::vector<float> qkv_;                  // [rows, qkv_width]
  std::vector<float> attended_;             // [rows, query_width]
  std::vector<float> gated_;                // [rows, intermediate_size]
  Operand packed_normed_, packed_attended_, packed_gated_, packed_sampled_;
  std::vector<std::vector<float>> normed_;  // for each thread [hidden_size]
};

}  // namespace carousel
