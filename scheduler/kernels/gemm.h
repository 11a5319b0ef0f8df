// y = x W^T over packed operands.
//
// Batch invariance: each output has its own accumulator and adds along k in order, whatever rows surround it. Sums of
// codes are exact integers within a group; the groups of an output are added in float, in order.
#pragma once

#include "packing.h"
#include "threads.h"

namespace carousel {

enum class Activation { silu, gelu_tanh };

// Where a product goes.
struct Product {
  float* data;
  int64_t stride;
  bool add = false;                          // to what is there: the residual stream
  Activation activation = Activation::silu;  // of a gated weight
};

// Some rows, those of the product from `first_row` on, and the weights that they alone are multiplied with.
struct RowGroup {
  Operand operand;
  const PackedWeights* weights;
  int64_t first_row;
};

// The products of groups of rows, none of them empty, with weights of one shape. Called by every thread of the team.
void multiply(Team& team, std::span<const RowGroup> groups, const Product& product);

// The products of several weights with the same rows, side by side. Called by every thread of the team.
void multiply(Team& team, const Operand& rows, std::span<const PackedWeights> weights, const Product& product);

}  // namespace carousel
