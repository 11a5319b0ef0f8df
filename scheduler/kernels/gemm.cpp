#include "gemm.h"

#include "dots.h"

namespace carousel {
namespace {

constexpr int64_t kRowsPerItem = 96;     // rows that stay in the second-level cache while panels go by
constexpr int64_t kBlocks = kRowsPerItem / kBlockRows;
constexpr int64_t kItemBytes = 1 << 16;  // of weights, at least: else threads spend their time on taking items
constexpr int64_t kStretchBytes = 1 << 14;  // of a panel, that stay in the first-level cache while blocks go by
constexpr int64_t kPrefetch = 4096;      // bytes ahead, across the page borders where the hardware stops

// ---- from sums to outputs ---------------------------------------------------------------------------

CAROUSEL_INLINE void put(float* to, f32v y, int64_t count, bool add) {
  if (count >= kLanes) {
    store(to, add ? load(to) + y : y);
    return;
  }
  for (int64_t i = 0; i < count; ++i) to[i] = add ? to[i] + y[i] : y[i];
}

void put_rows(const f32v (*sums)[kPanelTiles], int64_t first_row, int64_t num_rows, const PackedWeights& weights,
              int64_t panel, const Product& product) {
  const float* bias = weights.bias(panel);
  for (int64_t row = first_row; row < first_row + num_rows; ++row, ++sums) {
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

// ---- the kernels: a block of rows times some pieces of a panel of channels --------------------------------

// What a kernel adds to: a vector for each row and tile.
using Sums = f32v[kPanelTiles];

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

using Kernel = void (*)(const PackedRows&, const PackedRows::Block&, const PackedWeights&, int64_t panel,
                        int64_t first, int64_t last, Sums*);

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

// Blocks [first, last) of rows times one panel. Where they are several, they share a stretch of the panel while it is
// in the first-level cache.
void multiply_panel(const PackedRows& rows, int64_t first, int64_t last, const PackedWeights& weights, int64_t panel,
                    const Product& product) {
  f32v sums[kRowsPerItem][kPanelTiles];
  const int64_t first_row = rows.block(first).first, num_rows = rows.block(last - 1).last - first_row;
  std::fill_n(&sums[0][0], num_rows * kPanelTiles, f32v{});
  const int64_t pieces = weights.panel_bytes() / weights.piece_bytes();
  const int64_t stretch = last - first == 1 ? pieces : std::max<int64_t>(1, kStretchBytes / weights.piece_bytes());
  for (int64_t piece = 0; piece < pieces; piece += stretch)
    for (int64_t b = first; b < last; ++b) {
      const PackedRows::Block block = rows.block(b);
      kernel_for(weights, block.height())(rows, block, weights, panel, piece, std::min(piece + stretch, pieces),
                                          sums + (block.first - first_row));
    }
  put_rows(sums, first_row, num_rows, weights, panel, product);
}

}  // namespace

void multiply(Team& team, const Operand& operand, std::span<const PackedWeights> weights, const Product& product) {
  if (operand.rows() == 0) return;
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
    multiply_panel(operand.in(part->row_form()), first, last, *part, panel, here);
  });
}

void multiply(Team& team, std::span<const RowGroup> groups, const Product& product) {
  if (groups.empty()) return;
  const int64_t panels = groups[0].weights->num_panels();
  std::vector<int64_t> starts{0};  // the items of each group: for some of its blocks, one for each panel
  for (const RowGroup& group : groups)
    starts.push_back(starts.back() + (group.operand.num_blocks() + kBlocks - 1) / kBlocks * panels);
  const int64_t most = std::max<int64_t>(1, starts.back() / (8 * Team::size()));
  const int64_t chunk = std::clamp<int64_t>(kItemBytes / groups[0].weights->panel_bytes(), 1, most);
  team.for_each(starts.back(), chunk, [&](int64_t i) {
    const int64_t g = std::upper_bound(starts.begin(), starts.end(), i) - starts.begin() - 1;
    const RowGroup& group = groups[g];
    const int64_t first = (i - starts[g]) / panels * kBlocks;
    const int64_t last = std::min(first + kBlocks, group.operand.num_blocks());
    Product here = product;
    here.data += group.first_row * product.stride;
    multiply_panel(group.operand.in(group.weights->row_form()), first, last, *group.weights, i % panels, here);
  });
}

}  // namespace carousel
