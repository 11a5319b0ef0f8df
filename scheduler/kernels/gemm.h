// y = x W^T with weights packed once, at load, into the order in which the kernel streams them.
//
// Three modes share one kernel and one layout, because all three see the operands as 32-bit words: four int8, two
// bfloat16 or one float along k. A vector of weights holds one word of sixteen channels; a step multiplies it by
// one word of a row, broadcast.
//
//   int8  both quantised symmetrically, in groups of 64 along k with a scale of their own: weights once, rows as
//         they come. A group's sum is an exact int32; the groups of an output are added in float, in order.
//   bf16  weights and rows rounded to bfloat16, float sums
//   f32   all in float
//
// Batch invariance: each output has its own accumulator and adds along k in order, whatever rows surround it.
#pragma once

#include <memory>
#include <vector>

#include "simd.h"
#include "threads.h"

namespace carousel {

enum class Mode { int8, bf16, f32 };

constexpr int64_t values_per_word(Mode mode) { return mode == Mode::int8 ? 4 : mode == Mode::bf16 ? 2 : 1; }
constexpr int64_t words_in(Mode mode, int64_t values) {
  return (values + values_per_word(mode) - 1) / values_per_word(mode);
}

// A channel or row shares its scale with 63 neighbours and not with its outliers: scales per whole row cost a small
// model three per cent of perplexity, these a fifth of that.
constexpr int64_t kGroup8 = 64;
constexpr int64_t kGroupWords = kGroup8 / values_per_word(Mode::int8);
constexpr int64_t groups_in(int64_t values) { return (values + kGroup8 - 1) / kGroup8; }

constexpr int kPanelTiles = 2;                      // vectors of channels that a kernel call covers
constexpr int kPanel = kPanelTiles * kLanes;        // and channels
#if defined(__AVX512F__)
constexpr int kBlockRows = 12;                      // rows that share a pass over a panel: 24 accumulators
#else
constexpr int kBlockRows = 2;                       // half as many registers, and half as wide
#endif

// Memory for weights, from chunks made of huge pages where the system has them: a pass over the weights of a model
// otherwise misses the TLB at every step. Weights allocated in a row lie in a row.
std::shared_ptr<char> allocate_weights(size_t bytes);

// A row-major [rows, columns] matrix, borrowed.
struct Matrix {
  DType dtype;
  const void* data;
  int64_t rows, columns;
};

// The packed form of a weight [out_features, in_features]:
//   panels of 32 channels, each [words of k][2 tiles][16 lanes][values of the word]
// In a gated weight the first half of the channels are gates for the second half, as in a gated feed-forward
// layer; a panel then holds sixteen gates and their sixteen partners, and the product is activation(gate) * partner.
class PackedWeights {
 public:
  PackedWeights(Mode mode, const Matrix& weight, const float* bias, bool gated);

  Mode mode() const { return mode_; }
  bool gated() const { return gated_; }
  int64_t in_features() const { return in_features_; }
  int64_t out_features() const { return gated_ ? channels_ / 2 : channels_; }  // of the product
  int64_t num_panels() const { return num_panels_; }
  const char* panel(int64_t i) const { return words_.get() + i * words_in(mode_, in_features_) * kPanelTiles * 64; }
  const float* scales(int64_t panel) const { return scales_.data() + panel * groups_in(in_features_) * kPanel; }
  const float* bias(int64_t panel) const { return bias_.empty() ? nullptr : bias_.data() + panel * kPanel; }

 private:
  int64_t source_channel(int64_t packed) const;  // -1: padding
  void pack_channel(const float* row, int64_t packed);

  Mode mode_;
  bool gated_;
  int64_t channels_, in_features_, num_panels_;
  std::shared_ptr<char> words_;
  std::vector<float> scales_;  // int8 only: what one step is worth, [panels][groups][kPanel]
  std::vector<float> bias_;
};

// The left operand: rows in blocks of at most kBlockRows, of nearly equal height. A block is stored as
// [words of k][rows], so that the kernel reads one stream.
class PackedRows {
 public:
  struct Block {
    int64_t first, last;
    int64_t height() const { return last - first; }
  };

  void reshape(Mode mode, int64_t rows, int64_t width);
  Mode mode() const { return mode_; }
  int64_t rows() const { return rows_; }
  int64_t width() const { return width_; }
  int64_t num_blocks() const { return (rows_ + kBlockRows - 1) / kBlockRows; }
  Block block(int64_t i) const { return {i * rows_ / num_blocks(), (i + 1) * rows_ / num_blocks()}; }
  const uint32_t* words(const Block& block) const { return words_.data() + block.first * words_in(mode_, width_); }
  const float* scales(int64_t row) const { return scales_.data() + row * groups_in(width_); }
  const int32_t* offsets(int64_t row) const { return offsets_.data() + row * groups_in(width_); }

  // Rounds one row, `values`, into its place.
  void pack(const Block& block, int64_t row, const float* values);

 private:
  Mode mode_ = Mode::f32;
  int64_t rows_ = 0, width_ = 0;
  std::vector<uint32_t> words_;
  std::vector<float> scales_;     // int8 only: what one step of a row is worth, [rows][groups]
  std::vector<int32_t> offsets_;  // int8 only: what storing weights as w + 128 takes off each sum, [rows][groups]
};

enum class Activation { silu, gelu_tanh };

// Where a product goes.
struct Product {
  float* data;
  int64_t stride;
  bool add = false;                          // to what is there: the residual stream
  Activation activation = Activation::silu;  // of a gated weight
};

// Called by every thread of the team.
void multiply(Team& team, const PackedRows& rows, const PackedWeights& weights, const Product& product);

}  // namespace carousel
