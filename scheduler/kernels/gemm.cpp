#include "gemm.h"

#include <cstdlib>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace carousel {
namespace {

constexpr int64_t kRowsPerItem = 96;  // rows that stay in the second-level cache while panels go by
constexpr int64_t kPrefetch = 4096;   // bytes ahead, across the page borders where the hardware stops

// ---- one step: sixteen channels, one word of k ------------------------------------------------------

// sums[c] += the four products of unsigned bytes of weights[c] and signed bytes of row[c]. Exact.
CAROUSEL_INLINE i32x16 dot_bytes(i32x16 sums, i32x16 weights, i32x16 row) {
#if defined(__AVX512VNNI__)
  return (i32x16)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, (__m512i)row);
#elif defined(__AVX2__)
  // 16-bit halves, since the one-instruction product of bytes (vpmaddubsw) saturates.
  __m256i s[2], w[2], r[2];
  std::memcpy(s, &sums, sizeof s);
  std::memcpy(w, &weights, sizeof w);
  std::memcpy(r, &row, sizeof r);
  for (int i = 0; i < 2; ++i) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w[i], _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(r[i], 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w[i], 8), _mm256_srai_epi16(r[i], 8));
    s[i] = _mm256_add_epi32(s[i], _mm256_add_epi32(even, odd));
  }
  std::memcpy(&sums, s, sizeof s);
  return sums;
#else
  for (int shift = 0; shift < 32; shift += 8) sums += (weights >> shift & 255) * (row << (24 - shift) >> 24);
  return sums;
#endif
}

CAROUSEL_INLINE f32x16 dot_halves(f32x16 sums, i32x16 weights, i32x16 row) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(sums, (__m512bh)weights, (__m512bh)row);
#else
  sums = fma((f32x16)(weights << 16), (f32x16)(row << 16), sums);
  return fma((f32x16)(weights & int32_t(0xffff0000)), (f32x16)(row & int32_t(0xffff0000)), sums);
#endif
}

template <Mode mode>
struct Dot;

template <>
struct Dot<Mode::int8> {
  using Sums = i32x16;
  static CAROUSEL_INLINE Sums step(Sums sums, i32x16 weights, i32x16 row) { return dot_bytes(sums, weights, row); }
};

template <>
struct Dot<Mode::bf16> {
  using Sums = f32x16;
  static CAROUSEL_INLINE Sums step(Sums sums, i32x16 weights, i32x16 row) { return dot_halves(sums, weights, row); }
};

template <>
struct Dot<Mode::f32> {
  using Sums = f32x16;
  static CAROUSEL_INLINE Sums step(Sums sums, i32x16 weights, i32x16 row) {
    return fma((f32x16)weights, (f32x16)row, sums);
  }
};

// ---- from sums to outputs ---------------------------------------------------------------------------

CAROUSEL_INLINE void put(float* to, f32x16 y, int64_t count, bool add) {
  if (count >= kLanes) {
    store(to, add ? load(to) + y : y);
    return;
  }
  for (int64_t i = 0; i < count; ++i) to[i] = add ? to[i] + y[i] : y[i];
}

// One copy for all heights of blocks, so that the kernels stay small.
__attribute__((noinline)) inline void put_block(const f32x16 (*sums)[kPanelTiles], const PackedRows::Block& block,
                                                const PackedWeights& weights, int64_t panel, const Product& product) {
  const float* bias = weights.bias(panel);
  for (int64_t row = block.first; row < block.last; ++row, ++sums) {
    f32x16 y0 = (*sums)[0];
    f32x16 y1 = (*sums)[1];
    if (bias) {
      y0 += load(bias);
      y1 += load(bias + kLanes);
    }
    float* out = product.data + row * product.stride;
    if (weights.gated()) {
      const int64_t first = panel * kLanes;
      const f32x16 gate = product.activation == Activation::silu ? silu(y0) : gelu_tanh(y0);
      put(out + first, gate * y1, weights.out_features() - first, product.add);
    } else {
      const int64_t first = panel * kPanel;
      put(out + first, y0, weights.out_features() - first, product.add);
      put(out + first + kLanes, y1, weights.out_features() - first - kLanes, product.add);
    }
  }
}

// ---- the kernel: a block of rows times a panel of channels ---------------------------------------------

// sums[row][tile] += `steps` words of the block's rows times as many of the panel's channels. Both pointers move on.
template <Mode mode, int kRows>
CAROUSEL_INLINE void add_words(int64_t steps, const uint32_t*& row_words, const char*& weight_words,
                               typename Dot<mode>::Sums (&sums)[kRows][kPanelTiles]) {
  for (int64_t k = 0; k < steps; ++k) {
    i32x16 tile[kPanelTiles];
#pragma GCC unroll 2
    for (int t = 0; t < kPanelTiles; ++t) {
      tile[t] = load_as<i32x16>(weight_words + t * 64);
      __builtin_prefetch(weight_words + t * 64 + kPrefetch);
    }
    weight_words += kPanelTiles * 64;
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const i32x16 word = i32x16{} + int32_t(row_words[r]);
#pragma GCC unroll 2
      for (int t = 0; t < kPanelTiles; ++t) sums[r][t] = Dot<mode>::step(sums[r][t], tile[t], word);
    }
    row_words += kRows;
  }
}

template <Mode mode, int kRows>
void multiply_block(const PackedRows& rows, const PackedRows::Block& block, const PackedWeights& weights,
                    int64_t panel, const Product& product) {
  f32x16 sums[kRows][kPanelTiles] = {};
  const int64_t words = words_in(mode, rows.width());
  const uint32_t* row_words = rows.words(block);
  const char* weight_words = weights.panel(panel);
  if constexpr (mode == Mode::int8) {
    const float* scales = weights.scales(panel);
    for (int64_t group = 0; group < groups_in(rows.width()); ++group, scales += kPanel) {
      i32x16 exact[kRows][kPanelTiles];
      for (int r = 0; r < kRows; ++r)
        for (int t = 0; t < kPanelTiles; ++t) exact[r][t] = i32x16{} - rows.offsets(block.first + r)[group];
      add_words<mode, kRows>(std::min(kGroupWords, words - group * kGroupWords), row_words, weight_words, exact);
      for (int r = 0; r < kRows; ++r) {
        const f32x16 row_scale = splat(rows.scales(block.first + r)[group]);
        for (int t = 0; t < kPanelTiles; ++t)
          sums[r][t] = fma(__builtin_convertvector(exact[r][t], f32x16),
                           load(scales + t * kLanes) * row_scale, sums[r][t]);
      }
    }
  } else {
    add_words<mode, kRows>(words, row_words, weight_words, sums);
  }
  put_block(sums, block, weights, panel, product);
}

// Picks the kernel of the block's height.
template <Mode mode, int kRows = kBlockRows>
void multiply_any_block(const PackedRows& rows, const PackedRows::Block& block, const PackedWeights& weights,
                        int64_t panel, const Product& product) {
  if (block.height() == kRows) return multiply_block<mode, kRows>(rows, block, weights, panel, product);
  if constexpr (kRows > 1) multiply_any_block<mode, kRows - 1>(rows, block, weights, panel, product);
}

// ---- rounding -----------------------------------------------------------------------------------------

float largest_magnitude(const float* values, int64_t count) {
  f32x16 largest = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) largest = max(abs(load(values + i)), largest);
  float result = max_lanes(largest);
  for (; i < count; ++i) result = std::max(result, std::abs(values[i]));
  return result;
}

// Sixteen values from `values`, or what is left of them and zeros.
CAROUSEL_INLINE f32x16 load_some(const float* values, int64_t count) {
  if (count >= kLanes) return load(values);
  f32x16 some = {};
  std::memcpy(&some, values, count * sizeof(float));
  return some;
}

CAROUSEL_INLINE i32x16 round_to_int(f32x16 values, float steps_per_unit) {
  return (i32x16)fma(values, splat(steps_per_unit), splat(kRounder)) - std::bit_cast<int32_t>(kRounder);
}

constexpr float kSteps = 127.0f;  // symmetric: -128 is left out

}  // namespace

// ---- packed operands ------------------------------------------------------------------------------------

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

PackedWeights::PackedWeights(Mode mode, const Matrix& weight, const float* bias, bool gated)
    : mode_(mode),
      gated_(gated),
      channels_(weight.rows),
      in_features_(weight.columns),
      num_panels_(gated ? (weight.rows / 2 + kLanes - 1) / kLanes : (weight.rows + kPanel - 1) / kPanel),
      words_(allocate_weights(num_panels_ * words_in(mode, weight.columns) * kPanelTiles * 64)) {
  const int64_t packed_channels = num_panels_ * kPanel;
  if (mode == Mode::int8) scales_.resize(packed_channels * groups_in(in_features_));
  if (bias) bias_.resize(packed_channels);
#pragma omp parallel
  {
    std::vector<float> row(in_features_);
#pragma omp for
    for (int64_t packed = 0; packed < packed_channels; ++packed) {
      const int64_t channel = source_channel(packed);
      for (int64_t k = 0; k < in_features_; ++k) {
        const int64_t at = channel * in_features_ + k;
        row[k] = channel < 0                  ? 0.0f
                 : weight.dtype == DType::f32 ? static_cast<const float*>(weight.data)[at]
                                              : to_float(static_cast<const bf16*>(weight.data)[at]);
      }
      pack_channel(row.data(), packed);
      if (bias) bias_[packed] = channel < 0 ? 0.0f : bias[channel];
    }
  }
}

int64_t PackedWeights::source_channel(int64_t packed) const {
  if (!gated_) return packed < channels_ ? packed : -1;
  const int64_t tile = packed / kLanes, half = channels_ / 2;
  const int64_t partner = tile / 2 * kLanes + packed % kLanes;
  return partner < half ? tile % 2 * half + partner : -1;
}

void PackedWeights::pack_channel(const float* row, int64_t packed) {
  const int64_t step = values_per_word(mode_), words = words_in(mode_, in_features_);
  float* scales = mode_ == Mode::int8 ? &scales_[packed / kPanel * groups_in(in_features_) * kPanel + packed % kPanel]
                                      : nullptr;
  char* lane = words_.get() + (packed / kPanel * words * kPanelTiles + packed % kPanel / kLanes) * 64 +
               packed % kLanes * 4;
  float steps_per_unit = 0.0f;
  for (int64_t k = 0; k < words; ++k, lane += kPanelTiles * 64) {
    if (mode_ == Mode::int8 && k % kGroupWords == 0) {
      const int64_t first = k * step;
      const float largest = largest_magnitude(row + first, std::min(kGroup8, in_features_ - first));
      steps_per_unit = largest > 0.0f ? kSteps / largest : 0.0f;
      scales[k / kGroupWords * kPanel] = largest / kSteps;
    }
    const f32x16 values = load_some(row + k * step, std::min(step, in_features_ - k * step));
    uint32_t word = 0;
    if (mode_ == Mode::f32) word = std::bit_cast<uint32_t>(values[0]);
    if (mode_ == Mode::bf16) word = narrow(values)[0] | uint32_t(narrow(values)[1]) << 16;
    if (mode_ == Mode::int8)
      for (int i = 0; i < 4; ++i) word |= uint32_t(round_to_int(values, steps_per_unit)[i] + 128) << (8 * i);
    std::memcpy(lane, &word, sizeof word);
  }
}

void PackedRows::reshape(Mode mode, int64_t rows, int64_t width) {
  mode_ = mode;
  rows_ = rows;
  width_ = width;
  const auto grow = [](auto& buffer, int64_t size) {
    if (int64_t(buffer.size()) < size) buffer.resize(size);
  };
  grow(words_, rows * words_in(mode, width));
  if (mode == Mode::int8) {
    grow(scales_, rows * groups_in(width));
    grow(offsets_, rows * groups_in(width));
  }
}

void PackedRows::pack(const Block& block, int64_t row, const float* values) {
  uint32_t* to = words_.data() + block.first * words_in(mode_, width_) + (row - block.first);
  const int64_t height = block.height(), per_word = values_per_word(mode_);
  const auto put_words = [&](const auto& packed, int64_t count) {
    uint32_t words[kLanes];
    std::memcpy(words, &packed, sizeof packed);
    const int64_t num_words = (count + per_word - 1) / per_word;
    for (int64_t i = 0; i < num_words; ++i, to += height) *to = words[i];
  };
  if (mode_ != Mode::int8) {
    for (int64_t k = 0; k < width_; k += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, width_ - k);
      const f32x16 x = load_some(values + k, count);
      if (mode_ == Mode::f32) put_words(x, count);
      if (mode_ == Mode::bf16) put_words(narrow(x), count);
    }
    return;
  }
  for (int64_t group = 0; group < groups_in(width_); ++group) {
    const int64_t first = group * kGroup8, last = std::min(first + kGroup8, width_);
    const float largest = largest_magnitude(values + first, last - first);
    const float steps_per_unit = largest > 0.0f ? kSteps / largest : 0.0f;
    i32x16 total = {};
    for (int64_t k = first; k < last; k += kLanes) {
      const i32x16 rounded = round_to_int(load_some(values + k, last - k), steps_per_unit);
      total += rounded;
      put_words(__builtin_convertvector(rounded, i8x16), std::min<int64_t>(kLanes, last - k));
    }
    int32_t sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += total[lane];
    scales_[row * groups_in(width_) + group] = largest / kSteps;
    offsets_[row * groups_in(width_) + group] = 128 * sum;
  }
}

void multiply(Team& team, const PackedRows& rows, const PackedWeights& weights, const Product& product) {
  constexpr int64_t kBlocks = kRowsPerItem / kBlockRows;
  const int64_t row_items = (rows.num_blocks() + kBlocks - 1) / kBlocks, panels = weights.num_panels();
  team.for_each(row_items * panels, 1, [&](int64_t i) {
    const int64_t first = i / panels * kBlocks, last = std::min(first + kBlocks, rows.num_blocks());
    for (int64_t b = first; b < last; ++b) {
      const PackedRows::Block block = rows.block(b);
      switch (weights.mode()) {
        case Mode::int8: multiply_any_block<Mode::int8>(rows, block, weights, i % panels, product); break;
        case Mode::bf16: multiply_any_block<Mode::bf16>(rows, block, weights, i % panels, product); break;
        case Mode::f32: multiply_any_block<Mode::f32>(rows, block, weights, i % panels, product); break;
      }
    }
  });
}

}  // namespace carousel
