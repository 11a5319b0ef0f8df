#include "packing.h"

#include <cstdlib>
#include <mutex>
#include <new>

#include "require.h"
#include "rounding.h"
#include "threads.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace carousel {
namespace {

// Memory for weights, from chunks made of huge pages where the system has them: a pass over the weights of a model
// otherwise misses the TLB at every step. Weights allocated in a row lie in a row.
std::shared_ptr<char> allocate_weights(size_t bytes) {
  constexpr size_t kHugePage = size_t(2) << 20, kChunk = size_t(32) << 20;
  static std::mutex in_use;
  static std::shared_ptr<char> chunk;  // lives as long as any weights in it
  static size_t used = 0, size = 0;
  const std::lock_guard<std::mutex> turn(in_use);
  bytes = (bytes + 63) / 64 * 64;
  if (!chunk || used + bytes > size) {
    size = std::max(kChunk, (bytes + kHugePage - 1) / kHugePage * kHugePage);
    used = 0;
    chunk.reset(static_cast<char*>(std::aligned_alloc(kHugePage, size)), std::free);
    if (!chunk) throw std::bad_alloc();
#if defined(__linux__)
    madvise(chunk.get(), size, MADV_HUGEPAGE);
#endif
  }
  const std::shared_ptr<char> memory(chunk, chunk.get() + used);
  used += bytes;
  return memory;
}

// A vector of values from `values`, or what is left of them and zeros.
CAROUSEL_INLINE f32v load_some(const float* values, int64_t count) {
  if (count >= kLanes) return load(values);
  f32v some = {};
  std::memcpy(&some, values, count * sizeof(float));
  return some;
}

uint32_t bf16_bits(float x) {
  bf16 rounded;
  assign(rounded, x);
  return rounded.bits;
}

}  // namespace

// ---- weights ----------------------------------------------------------------------------------------------

GroupLayout group_layout(const Coding& coding) {
  const int64_t numbers = coding.minimums ? 2 * kPanel : kPanel;
  return {code_vectors(coding.bits, coding.group), numbers * (coding.wide_scales ? 4 : 2)};
}

PackedWeights::PackedWeights(Mode mode, std::span<const Matrix> parts, const float* bias, bool gated)
    : mode_(mode), gated_(gated) {
  require(!parts.empty() && parts[0].columns > 0, "weights must not be empty");
  in_features_ = parts[0].columns;
  for (const Matrix& part : parts) {
    require(part.columns == in_features_, "stacked weights must take the same number of features");
    require(mode != Mode::stored || part.is_coded(), "plain numbers have no stored codes to multiply from");
    require(mode != Mode::stored || part.type == parts[0].type, "stacked weights must be stored alike");
    channels_ += part.rows;
  }
  require(channels_ > 0, "weights must not be empty");
  require(!gated || channels_ % 2 == 0, "a gated weight must have an even number of rows");
  if (is_coded())
    coding_ = mode == Mode::int8 ? kInt8 : mode == Mode::int4 ? kInt4 : coding_of(parts[0].type);
  num_panels_ = gated ? (channels_ / 2 + kLanes - 1) / kLanes : (channels_ + kPanel - 1) / kPanel;
  piece_bytes_ = is_coded() ? group_layout(coding_).bytes() : kPanelTiles * kVectorBytes;
  const int64_t piece = is_coded() ? coding_.group : mode == Mode::bf16 ? 2 : 1;  // values of k
  panel_bytes_ = (in_features_ + piece - 1) / piece * piece_bytes_;
  words_ = allocate_weights(num_panels_ * panel_bytes_);
  const int64_t packed_channels = num_panels_ * kPanel;
  if (bias) bias_.resize(packed_channels);
  parallel(num_cores(), [&](Team& team) {
    std::vector<float> values(in_features_);
    CodedRow codes;
    team.for_each(num_panels_, 1, [&](int64_t panel) {
      std::memset(words_.get() + panel * panel_bytes_, 0, panel_bytes_);
      for (int64_t packed = panel * kPanel; packed < (panel + 1) * kPanel; ++packed) {
        int64_t row = source_channel(packed);
        if (row < 0) continue;
        if (bias) bias_[packed] = bias[row];
        const Matrix* part = parts.data();
        for (; row >= part->rows; ++part) row -= part->rows;
        if (mode == Mode::stored) {
          read_codes(*part, row, codes);
        } else {
          read_values(*part, row, values.data());
          if (is_coded()) round_row(values.data(), in_features_, coding_, codes);
        }
        if (is_coded()) pack_codes(packed, codes);
        else pack_values(packed, values.data());
      }
    });
  });
}

RowForm PackedWeights::row_form() const {
  if (mode_ == Mode::f32) return {RowForm::f32, 0};
  if (mode_ == Mode::bf16) return {kHasHalfDots ? RowForm::pairs : RowForm::rounded, 0};
  return {reads_shorts(coding_.bits) ? RowForm::shorts : RowForm::bytes, coding_.group};
}

int64_t PackedWeights::source_channel(int64_t packed) const {
  if (!gated_) return packed < channels_ ? packed : -1;
  const int64_t tile = packed / kLanes, half = channels_ / 2;
  const int64_t partner = tile / kPanelTiles * kLanes + packed % kLanes;
  return partner < half ? tile % kPanelTiles * half + partner : -1;
}

void PackedWeights::pack_values(int64_t packed, const float* row) {
  char* lane = words_.get() + packed / kPanel * panel_bytes_ + packed % kPanel * 4;
  const int64_t step = mode_ == Mode::bf16 ? 2 : 1;
  for (int64_t k = 0; k < in_features_; k += step, lane += kPanelTiles * kVectorBytes) {
    uint32_t word = std::bit_cast<uint32_t>(row[k]);
    if (mode_ == Mode::bf16) word = bf16_bits(row[k]) | (k + 1 < in_features_ ? bf16_bits(row[k + 1]) << 16 : 0);
    std::memcpy(lane, &word, sizeof word);
  }
}

void PackedWeights::pack_codes(int64_t packed, const CodedRow& row) {
  const GroupLayout layout = group_layout(coding_);
  const int64_t channel = packed % kPanel;
  char* group = words_.get() + packed / kPanel * panel_bytes_;
  const auto put_number = [&](int64_t place, float x) {
    const uint16_t half = to_half(x);
    if (coding_.wide_scales) std::memcpy(group + place * 4, &x, 4);
    else std::memcpy(group + place * 2, &half, 2);
  };
  for (size_t g = 0; g < row.scales.size(); ++g, group += layout.bytes()) {
    put_number(channel, row.scales[g]);
    if (coding_.minimums) put_number(kPanel + channel, row.minimums[g]);
    // The four bytes of this channel in the vectors of its tile.
    const auto bytes = [&](int64_t vector) {
      return reinterpret_cast<uint8_t*>(group + layout.header_bytes + vector * kPanelTiles * kVectorBytes + channel * 4);
    };
    const uint8_t* codes = &row.codes[g * coding_.group];
    for (int64_t word = 0; word < coding_.group / 4; ++word) {
      for (int i = 0; i < 4; ++i) {
        const uint8_t code = codes[word * 4 + i];
        if (coding_.bits == 8) {
          bytes(word)[i] = kHasByteDots ? code : code ^ 0x80;  // else signed
          continue;
        }
        bytes(word / 2)[i] |= (code & 15) << word % 2 * 4;
        if (coding_.bits == 5) bytes(layout.vectors - 1)[i] |= (code >> 4) << word;
        if (coding_.bits == 6) bytes(layout.vectors - 1)[i] |= (code >> 4) << word * 2;
      }
    }
  }
}

// ---- rows -------------------------------------------------------------------------------------------------

int64_t RowForm::words(int64_t width) const {
  switch (kind) {
    case f32: return width;
    case rounded: return (width + 1) / 2 * 2;
    case pairs: return (width + 1) / 2;
    case bytes: return groups(width) * group / 4;
    case shorts: return groups(width) * group / 2;
  }
  return 0;
}

void PackedRows::reshape(int64_t rows, int64_t width) {
  rows_ = rows;
  width_ = width;
  words_per_row_ = form_.words(width);
  groups_ = form_.has_scales() ? form_.groups(width) : 0;
  const auto grow = [](auto& buffer, int64_t size) {
    if (int64_t(buffer.size()) < size) buffer.resize(size);
  };
  grow(words_, rows * words_per_row_);
  grow(scales_, rows * groups_);
  grow(totals_, rows * groups_);
}

void PackedRows::pack(const Block& block, int64_t row, const float* values) {
  const int64_t height = block.height();
  uint32_t* to = words_.data() + block.first * words_per_row_ + (row - block.first);
  const auto put_words = [&](const auto& packed, int64_t count) {
    uint32_t words[kLanes];
    std::memcpy(words, &packed, sizeof packed);
    for (int64_t i = 0; i < count; ++i, to += height) *to = words[i];
  };
  if (!form_.has_scales()) {
    const int64_t end = form_.kind == RowForm::f32 ? width_ : (width_ + 1) / 2 * 2;
    for (int64_t k = 0; k < end; k += kLanes) {
      const f32v x = load_some(values + k, width_ - k);
      const int64_t count = std::min<int64_t>(kLanes, end - k);
      if (form_.kind == RowForm::f32) put_words(x, count);
      if (form_.kind == RowForm::rounded) put_words(widen(narrow(x)), count);
      if (form_.kind == RowForm::pairs) put_words(narrow(x), count / 2);
    }
    return;
  }
  float* scale = scales_.data() + block.first * groups_ + (row - block.first);
  float* total = totals_.data() + block.first * groups_ + (row - block.first);
  for (int64_t g = 0; g < groups_; ++g, scale += height, total += height) {
    const int64_t first = g * form_.group, end = std::min(first + form_.group, width_);
    const float largest = largest_magnitude(values + first, end - first), steps = 127.0f / largest;
    // No steps where all is zero or next to it, and none where something is infinite or a NaN: then the scale is that
    // too, and zero steps of it are a NaN, as is every sum with it.
    const bool has_steps = steps > 0.0f && std::isfinite(steps);
    const float steps_per_unit = has_steps ? steps : 0.0f;
    const int64_t last = has_steps ? end : first;
    i32v sum = {};
    for (int64_t k = first; k < first + form_.group; k += kLanes) {
      const i32v rounded = round_to_int(k < last ? load_some(values + k, last - k) : f32v{}, steps_per_unit);
      sum += rounded;
      if (form_.kind == RowForm::bytes) {
        put_words(__builtin_convertvector(rounded, i8v), kLanes / 4);
      } else {
        // The kernel has the even bytes of a word of weights in one vector and the odd ones in another.
        for (int i = 0; i < kLanes; i += 4)
          for (int odd = 0; odd < 2; ++odd, to += height)
            *to = (uint32_t(rounded[i + odd]) & 0xffff) | uint32_t(rounded[i + odd + 2]) << 16;
      }
    }
    *scale = largest / 127.0f;
    *total = *scale * float(sum_lanes(sum));
  }
}

// ---- an operand in several forms ----------------------------------------------------------------------------

void Operand::add_forms_of(std::span<const PackedWeights> weights) {
  for (const PackedWeights& part : weights) {
    const auto same = [&](const PackedRows& rows) { return rows.form() == part.row_form(); };
    if (std::none_of(forms_.begin(), forms_.end(), same)) forms_.emplace_back(part.row_form());
  }
}

void Operand::reshape(int64_t rows, int64_t width) {
  for (PackedRows& form : forms_) form.reshape(rows, width);
}

const PackedRows& Operand::in(const RowForm& form) const {
  return *std::find_if(forms_.begin(), forms_.end(), [&](const PackedRows& rows) { return rows.form() == form; });
}

void Operand::pack(std::span<const PackedWeights> readers, const PackedRows::Block& block, int64_t row,
                   const float* values) {
  for (PackedRows& form : forms_) {
    const auto reads = [&](const PackedWeights& weights) { return weights.row_form() == form.form(); };
    if (std::any_of(readers.begin(), readers.end(), reads)) form.pack(block, row, values);
  }
}

}  // namespace carousel
