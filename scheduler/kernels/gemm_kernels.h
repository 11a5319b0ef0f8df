// The kernels of products: a block of rows times some pieces of a panel of channels.
//
// There is one for each height of a block and each kind of weights. They are most of what the compiler has to do, so each
// kind is instantiated in a file of its own (gemm_numbers.cpp, gemm_codes4.cpp, ...), and all are compiled at a time.
#pragma once

#include "dots.h"
#include "packing.h"

namespace carousel {

// What a kernel adds to: a vector for each row and tile.
using Sums = f32v[kPanelTiles];

using Kernel = void (*)(const PackedRows&, const PackedRows::Block&, const PackedWeights&, int64_t panel,
                        int64_t first, int64_t last, Sums*);

constexpr int64_t kPrefetch = 4096;  // bytes ahead, across the page borders where the hardware stops

CAROUSEL_INLINE void prefetch(const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i + kPrefetch);
}

template <Mode mode, int kRows>
void multiply_numbers(const PackedRows& rows, const PackedRows::Block& block, const PackedWeights& weights,
                      int64_t panel, int64_t first, int64_t last, Sums* to) {
  constexpr int kWords = mode == Mode::bf16 && !kHasHalfDots ? 2 : 1;  // of a row, to one of weights
  f32v sums[kRows][kPanelTiles];
  unrolled<kRows>(CAROUSEL_EACH(r) { unrolled<kPanelTiles>(CAROUSEL_EACH(t) { sums[r][t] = to[r][t]; }); });
  const uint32_t* words = rows.words(block) + first * kWords * kRows;
  const char* from = weights.panel(panel) + first * weights.piece_bytes();
  const char* const end = weights.panel(panel) + last * weights.piece_bytes();
  for (; from < end; from += kPanelTiles * kVectorBytes) {
    prefetch(from, kPanelTiles * kVectorBytes);
    dot_word<mode, kRows>(from, words, sums);
  }
  unrolled<kRows>(CAROUSEL_EACH(r) { unrolled<kPanelTiles>(CAROUSEL_EACH(t) { to[r][t] = sums[r][t]; }); });
}

// The scales or minimums of a tile.
CAROUSEL_INLINE f32v load_numbers(const char* numbers, int64_t first, bool wide) {
  return wide ? load(reinterpret_cast<const float*>(numbers) + first)
              : widen_half(load_as<u16v>(numbers + 2 * first));
}

template <int kBits, int64_t kGroup, int kRows>
void multiply_codes(const PackedRows& rows, const PackedRows::Block& block, const PackedWeights& weights,
                    int64_t panel, int64_t first, int64_t last, Sums* to) {
  constexpr bool kSigned = kBits == 8 && !kHasByteDots;  // these codes are packed without their offset
  constexpr int64_t kWords = reads_shorts(kBits) ? kGroup / 2 : kGroup / 4;  // of a row, in a group
  const Coding& coding = weights.coding();
  const GroupLayout layout = group_layout(coding);
  const int64_t number_bytes = coding.wide_scales ? 4 : 2;
  const float zero = -float(coding.offset);
  f32v sums[kRows][kPanelTiles];
  unrolled<kRows>(CAROUSEL_EACH(r) { unrolled<kPanelTiles>(CAROUSEL_EACH(t) { sums[r][t] = to[r][t]; }); });
  const uint32_t* words = rows.words(block) + first * kWords * kRows;
  const float* row_scales = rows.scales(block) + first * kRows;
  const float* row_totals = rows.totals(block) + first * kRows;
  const char* from = weights.panel(panel) + first * layout.bytes();
  for (int64_t group = first; group < last; ++group, from += layout.bytes()) {
    prefetch(from, layout.bytes());
    i32v exact[kRows][kPanelTiles];
    dot_group<kBits, kGroup, kRows>(from + layout.header_bytes, words, exact);
    words += kWords * kRows;
    unrolled<kPanelTiles>(CAROUSEL_EACH(t) {
      const f32v scale = load_numbers(from, t * kLanes, coding.wide_scales);
      unrolled<kRows>(CAROUSEL_EACH(r) {
        sums[r][t] = fma(__builtin_convertvector(exact[r][t], f32v) * row_scales[r], scale, sums[r][t]);
      });
      if constexpr (!kSigned) {
        const f32v minimum = coding.minimums ? load_numbers(from + kPanel * number_bytes, t * kLanes, coding.wide_scales)
                                             : scale * zero;
        unrolled<kRows>(CAROUSEL_EACH(r) { sums[r][t] = fma(minimum, splat(row_totals[r]), sums[r][t]); });
      }
    });
    row_scales += kRows;
    row_totals += kRows;
  }
  unrolled<kRows>(CAROUSEL_EACH(r) { unrolled<kPanelTiles>(CAROUSEL_EACH(t) { to[r][t] = sums[r][t]; }); });
}

template <Mode mode>
struct Numbers {
  template <int kRows>
  static constexpr Kernel kernel = &multiply_numbers<mode, kRows>;
};

template <int kBits, int64_t kGroup>
struct Codes {
  template <int kRows>
  static constexpr Kernel kernel = &multiply_codes<kBits, kGroup, kRows>;
};

// The kernel of a block's height.
template <class Kind, int kRows = kBlockRows>
Kernel kernel_of(int64_t height) {
  if constexpr (kRows > 1)
    if (height < kRows) return kernel_of<Kind, kRows - 1>(height);
  return Kind::template kernel<kRows>;
}

extern template Kernel kernel_of<Numbers<Mode::f32>>(int64_t height);
extern template Kernel kernel_of<Numbers<Mode::bf16>>(int64_t height);
extern template Kernel kernel_of<Codes<4, 32>>(int64_t height);
extern template Kernel kernel_of<Codes<5, 32>>(int64_t height);
extern template Kernel kernel_of<Codes<6, 16>>(int64_t height);
extern template Kernel kernel_of<Codes<8, 32>>(int64_t height);
extern template Kernel kernel_of<Codes<8, 64>>(int64_t height);

}  // namespace carousel
