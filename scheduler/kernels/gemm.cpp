#include "gemm.h"

#include "dots.h"

namespace carousel {
namespace {

constexpr int64_t kRowsPerItem = 96;     // rows that stay in the second-level cache while panels go by
constexpr int64_t kItemBytes = 1 << 16;  // of weights, at least: else threads spend their time on taking items
constexpr int64_t kPrefetch = 4096;      // bytes ahead, across the page borders where the hardware stops

// ---- from sums to outputs ---------------------------------------------------------------------------

CAROUSEL_INLINE void put(float* to, f32v y, int64_t count, bool add) {
  if (count >= kLanes) {
    store(to, add ? load(to) + y : y);
    return;
  }
  for (int64_t i = 0; i < count; ++i) to[i] = add ? to[i] + y[i] : y[i];
}

// One copy for all heights of blocks, so that the kernels stay small.
__attribute__((noinline)) inline void put_block(const f32v (*sums)[kPanelTiles], const PackedRows::Block& block,
                                                const PackedWeights& weights, int64_t panel, const Product& product) {
  const float* bias = weights.bias(panel);
  for (int64_t row = block.first; row < block.last; ++row, ++sums) {
    f32v y0 = (*sums)[0];
    f32v y1 = (*sums)[1];
    if (bias) {
      y0 += load(bias);
      y1 += load(bias + kLanes);
    }
    float* out = product.data + row * product.stride;
    if (weights.gated()) {
      const int64_t first = panel * kLanes;
      const f32v gate = product.activation == Activation::silu ? silu(y0) : gelu_tanh(y0);
      put(out + first, gate * y1, weights.out_features() - first, product.add);
    } else {
      const int64_t first = panel * kPanel;
      put(out + first, y0, weights.out_features() - first, product.add);
      put(out + first + kLanes, y1, weights.out_features() - first - kLanes, product.add);
    }
  }
}

// ---- the kernels: a block of rows times a panel of channels ---------------------------------------------

CAROUSEL_INLINE void prefetch(const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i + kPrefetch);
}

template <Mode mode, int kRows>
void multiply_numbers(const PackedRows& rows, const PackedRows::Block& block, const PackedWeights& weights,
                      int64_t panel, const Product& product) {
  f32v sums[kRows][kPanelTiles] = {};
  const uint32_t* words = rows.words(block);
  const char* from = weights.panel(panel);
  const char* const end = from + weights.panel_bytes();
  while (from < end) {
    prefetch(from, kPanelTiles * kVectorBytes);
    dot_word<mode, kRows>(from, words, sums);
  }
  put_block(sums, block, weights, panel, product);
}

// The scales or minimums of a tile.
CAROUSEL_INLINE f32v load_numbers(const char* numbers, int64_t first, bool wide) {
  return wide ? load(reinterpret_cast<const float*>(numbers) + first)
              : widen_half(load_as<u16v>(numbers + 2 * first));
}

template <int kBits, int64_t kGroup, int kRows>
void multiply_codes(const PackedRows& rows, const PackedRows::Block& block, const PackedWeights& weights,
                    int64_t panel, const Product& product) {
  constexpr bool kSigned = kBits == 8 && !kHasByteDots;  // these codes are packed without their offset
  const Coding& coding = weights.coding();
  const GroupLayout layout = group_layout(coding);
  const int64_t number_bytes = coding.wide_scales ? 4 : 2;
  const float zero = -float(coding.offset);
  f32v sums[kRows][kPanelTiles] = {};
  const uint32_t* words = rows.words(block);
  const float* row_scales = rows.scales(block);
  const float* row_totals = rows.totals(block);
  const char* from = weights.panel(panel);
  const char* const end = from + weights.panel_bytes();
  for (; from < end; from += layout.bytes()) {
    prefetch(from, layout.bytes());
    i32v exact[kRows][kPanelTiles];
    dot_group<kBits, kGroup, kRows>(from + layout.header_bytes, words, exact);
    words += (reads_shorts(kBits) ? kGroup / 2 : kGroup / 4) * kRows;
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
  put_block(sums, block, weights, panel, product);
}

using Kernel = void (*)(const PackedRows&, const PackedRows::Block&, const PackedWeights&, int64_t panel,
                        const Product&);

// Picks the kernel of the block's height.
template <template <int> class Of, int kRows = kBlockRows>
Kernel of_height(int64_t height) {
  if constexpr (kRows > 1)
    if (height < kRows) return of_height<Of, kRows - 1>(height);
  return Of<kRows>::kernel;
}

template <Mode mode>
struct Numbers {
  template <int kRows>
  struct Of { static constexpr Kernel kernel = &multiply_numbers<mode, kRows>; };
};

template <int kBits, int64_t kGroup>
struct Codes {
  template <int kRows>
  struct Of { static constexpr Kernel kernel = &multiply_codes<kBits, kGroup, kRows>; };
};

Kernel kernel_for(const PackedWeights& weights, int64_t height) {
  if (weights.mode() == Mode::f32) return of_height<Numbers<Mode::f32>::Of>(height);
  if (weights.mode() == Mode::bf16) return of_height<Numbers<Mode::bf16>::Of>(height);
  switch (weights.coding().bits) {
    case 4: return of_height<Codes<4, 32>::Of>(height);
    case 5: return of_height<Codes<5, 32>::Of>(height);
    case 6: return of_height<Codes<6, 16>::Of>(height);
    default:
      return weights.coding().group == 32 ? of_height<Codes<8, 32>::Of>(height) : of_height<Codes<8, 64>::Of>(height);
  }
}

}  // namespace

void multiply(Team& team, const Operand& operand, std::span<const PackedWeights> weights, const Product& product) {
  if (operand.rows() == 0) return;
  constexpr int64_t kBlocks = kRowsPerItem / kBlockRows;
  const int64_t row_items = (operand.num_blocks() + kBlocks - 1) / kBlocks;
  int64_t panels = 0, panel_bytes = 0;
  for (const PackedWeights& part : weights) {
    panels += part.num_panels();
    panel_bytes = std::max(panel_bytes, part.panel_bytes());
  }
  // With few rows an item is several panels, though not so many that threads could not share them evenly.
  const int64_t work = panel_bytes * std::min(operand.num_blocks(), kBlocks);
  const int64_t chunk = std::max<int64_t>(1, std::min(kItemBytes / work, panels / (8 * Team::size())));
  team.for_each(row_items * panels, chunk, [&](int64_t i) {
    const int64_t first = i / panels * kBlocks, last = std::min(first + kBlocks, operand.num_blocks());
    int64_t panel = i % panels;
    Product here = product;
    const PackedWeights* part = weights.data();
    for (; panel >= part->num_panels(); ++part) {
      panel -= part->num_panels();
      here.data += part->out_features();
    }
    const PackedRows& rows = operand.in(part->row_form());
    for (int64_t b = first; b < last; ++b) {
      const PackedRows::Block block = rows.block(b);
      kernel_for(*part, block.height())(rows, block, *part, panel, here);
    }
  });
}

}  // namespace carousel
