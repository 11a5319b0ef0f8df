// The two operands of a product y = x W^T, in the order in which the kernels stream them.
//
// Both are seen as 32-bit words along k. A vector of weights holds one word of kLanes channels; a step multiplies it by
// one word of a row, broadcast. What a word holds:
//
//   weights   f32      one float
//             bf16     two bfloat16
//             coded    codes of four, five, six or eight bits, which become four bytes on their way into the product
//   rows      f32      one float
//             rounded  one float, rounded to bfloat16: for processors that multiply bfloat16 as floats
//             pairs    two bfloat16
//             bytes    four int8, in groups along k with a scale each
//             shorts   two int16 that hold such int8, where the processor's products of bytes would overflow
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "matrix.h"

namespace carousel {

// What a product is to be made of. `stored` multiplies from the codes of a GGUF file as they are.
enum class Mode { f32, bf16, int8, int4, stored };

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool kHasByteDots = true;  // vpdpbusd: unsigned bytes of weights times signed bytes of a row, exact
#else
constexpr bool kHasByteDots = false;
#endif
#if defined(__AVX2__)
constexpr bool kHasByteSums = true;  // vpmaddubsw: the same in pairs, into 16 bits, so for small codes only
#else
constexpr bool kHasByteSums = false;
#endif
#if defined(__AVX512BF16__)
constexpr bool kHasHalfDots = true;  // vdpbf16ps
#else
constexpr bool kHasHalfDots = false;
#endif

// Whether codes of so many bits are multiplied as 16-bit numbers.
constexpr bool reads_shorts(int bits) { return !kHasByteDots && (bits == 8 || !kHasByteSums); }

constexpr int kPanelTiles = 2;                // vectors of channels that a kernel call covers
constexpr int kPanel = kPanelTiles * kLanes;  // and channels
constexpr int64_t kVectorBytes = 4 * kLanes;
#if defined(__AVX512F__)
constexpr int kBlockRows = 12;  // rows that share a pass over a panel: 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kBlockRows = 6;   // 12 of 16
#else
constexpr int kBlockRows = 4;
#endif

struct RowForm {
  enum Kind { f32, rounded, pairs, bytes, shorts } kind;
  int64_t group;  // of bytes and shorts

  bool has_scales() const { return kind == bytes || kind == shorts; }
  int64_t groups(int64_t width) const { return (width + group - 1) / group; }
  int64_t words(int64_t width) const;  // of one row
  bool operator==(const RowForm&) const = default;
};

// The packed form of weights [out_features, in_features]: panels of kPanel channels. A panel of f32 or bf16 is
//   [words of k][2 tiles][kLanes]
// and one of codes a run of groups, each [scales][minimums, if any][vectors of codes][2 tiles]. In a gated weight the
// first half of the channels are gates for the second half, as in a gated feed-forward layer; a panel then holds
// kLanes gates and their partners, and the product is activation(gate) * partner.
class PackedWeights {
 public:
  // Stacks the parts along the channels. `stored` wants coded parts, all of one type. The biases, [channels] or null,
  // are copied.
  PackedWeights(Mode mode, std::span<const Matrix> parts, const float* bias, bool gated);

  Mode mode() const { return mode_; }
  bool is_coded() const { return mode_ != Mode::f32 && mode_ != Mode::bf16; }
  const Coding& coding() const { return coding_; }  // where it is coded
  RowForm row_form() const;
  bool gated() const { return gated_; }
  int64_t in_features() const { return in_features_; }
  int64_t out_features() const { return gated_ ? channels_ / 2 : channels_; }  // of the product
  int64_t num_panels() const { return num_panels_; }
  int64_t panel_bytes() const { return panel_bytes_; }
  int64_t piece_bytes() const { return piece_bytes_; }  // of a panel: a group of codes, or one word of k
  const char* panel(int64_t i) const { return words_.get() + i * panel_bytes_; }
  const float* bias(int64_t panel) const { return bias_.empty() ? nullptr : bias_.data() + panel * kPanel; }
  int64_t bytes() const { return num_panels_ * panel_bytes_ + int64_t(bias_.size() * sizeof(float)); }

 private:
  int64_t source_channel(int64_t packed) const;  // -1: padding
  void pack_values(int64_t packed, const float* row);
  void pack_codes(int64_t packed, const CodedRow& row);
  char* tile(int64_t packed) const;  // where the tile of a channel begins in its panel

  Mode mode_;
  Coding coding_{};
  bool gated_;
  int64_t channels_ = 0, in_features_ = 0, num_panels_ = 0, panel_bytes_ = 0, piece_bytes_ = 0;
  std::shared_ptr<char> words_;
  std::vector<float> bias_;
};

// Where things lie in a group of codes.
struct GroupLayout {
  int64_t vectors;       // of codes for each tile
  int64_t header_bytes;  // scales and minimums
  int64_t bytes() const { return header_bytes + vectors * kPanelTiles * kVectorBytes; }
};
constexpr int64_t code_vectors(int bits, int64_t group) {
  // Nibbles of two words share a vector; the bits above them share one more.
  return bits == 8 ? group / 4 : group / 8 + (bits > 4);
}
GroupLayout group_layout(const Coding& coding);

// The left operand in one form: rows in blocks of at most kBlockRows, of nearly equal height. A block is stored as
// [words of k][rows], so that the kernel reads one stream, and its scales as [groups][rows].
class PackedRows {
 public:
  struct Block {
    int64_t first, last;
    int64_t height() const { return last - first; }
  };

  explicit PackedRows(const RowForm& form) : form_(form) {}
  void reshape(int64_t rows, int64_t width);

  const RowForm& form() const { return form_; }
  int64_t rows() const { return rows_; }
  int64_t width() const { return width_; }
  int64_t num_blocks() const { return (rows_ + kBlockRows - 1) / kBlockRows; }
  Block block(int64_t i) const { return {i * rows_ / num_blocks(), (i + 1) * rows_ / num_blocks()}; }
  const uint32_t* words(const Block& block) const { return words_.data() + block.first * words_per_row_; }
  const float* scales(const Block& block) const { return scales_.data() + block.first * groups_; }
  const float* totals(const Block& block) const { return totals_.data() + block.first * groups_; }

  // Rounds one row, `values`, into its place.
  void pack(const Block& block, int64_t row, const float* values);

 private:
  RowForm form_;
  int64_t rows_ = 0, width_ = 0, words_per_row_ = 0, groups_ = 0;
  std::vector<uint32_t> words_;
  std::vector<float> scales_;  // what one step of a row is worth, in each group
  std::vector<float> totals_;  // the sum of a row's rounded values, which a weight's minimum multiplies
};

// The left operand in each form that the weights it meets ask for.
class Operand {
 public:
  void add_forms_of(std::span<const PackedWeights> weights);
  void reshape(int64_t rows, int64_t width);
  int64_t num_blocks() const { return forms_.front().num_blocks(); }
  int64_t rows() const { return forms_.front().rows(); }
  PackedRows::Block block(int64_t i) const { return forms_.front().block(i); }
  const PackedRows& in(const RowForm& form) const;

  // Packs one row in those forms that these weights read.
  void pack(std::span<const PackedWeights> readers, const PackedRows::Block& block, int64_t row, const float* values);

 private:
  std::vector<PackedRows> forms_;
};

}  // namespace carousel
