#include "gemm.h"

#include "gemm_kernels.h"

namespace carousel {
namespace {

constexpr int64_t kRowsPerItem = 96;     // rows that stay in the second-level cache while panels go by
constexpr int64_t kBlocks = kRowsPerItem / kBlockRows;
constexpr int64_t kItemBytes = 1 << 16;  // of weights, at least: else threads spend their time on taking items
constexpr int64_t kStretchBytes = 1 << 14;  // of a panel, that stay in the first-level cache while blocks go by

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

Kernel kernel_for(const PackedWeights& weights, int64_t height) {
  if (weights.mode() == Mode::f32) return kernel_of<Numbers<Mode::f32>>(height);
  if (weights.mode() == Mode::bf16) return kernel_of<Numbers<Mode::bf16>>(height);
  switch (weights.coding().bits) {
    case 4: return kernel_of<Codes<4, 32>>(height);
    case 5: return kernel_of<Codes<5, 32>>(height);
    case 6: return kernel_of<Codes<6, 16>>(height);
    default:
      return weights.coding().group == 32 ? kernel_of<Codes<8, 32>>(height) : kernel_of<Codes<8, 64>>(height);
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
  const int64_t chunk = std::max<int64_t>(1, std::min(kItemBytes / work, panels / (8 * team.size())));
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
  const int64_t most = std::max<int64_t>(1, starts.back() / (8 * team.size()));
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
