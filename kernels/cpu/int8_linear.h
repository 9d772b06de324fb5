// The op `int8_linear` of rtx/kernels/int8_linear.py: the contract and the reference are there.
#pragma once

#include <cstdint>
#include <vector>

#include "machine.h"
#include "norm.h"

namespace rtx {

enum class Activation { kNone, kGelu, kGeluTanh, kSilu };

// Bytes up to 255 by weights up to 127, so often that the sum fits into 32 bits.
constexpr int64_t kMostInputs = 65536;

// A weight as the kernels read it: panels of 16 columns, four rows of each together. Columns come in parts, each of
// which begins with a panel of its own.
struct PackedWeight {
  struct Panel {
    int64_t part, column;  // which part, and where in it the panel begins
  };

  int64_t in = 0, padded_in = 0;
  std::vector<int64_t> parts;  // columns of each
  std::vector<Panel> panels;
  const int8_t* values;                        // [panels][padded_in / 4][16][4], of who made it
  std::vector<int32_t> start;                  // [panels][16]: -128 * the sum of a column's integers
  std::vector<float> scale, column_sum, bias;  // [panels][16]; bias is 0 where there is none

  // values: as above, and there for as long as this is; scale, column_sum: one for each column of all parts; bias:
  // likewise, or null.
  PackedWeight(const int8_t* values, const float* scale, const float* column_sum, const float* bias, int64_t in,
               std::vector<int64_t> parts);
};

// What `values` has to be long: as many bytes.
int64_t packed_size(int64_t in, const std::vector<int64_t>& parts);

// What is done around the product.
struct Around {
  Norm norm;  // of x, or of the sum of product and residual
  bool norm_of_output = false;
  Activation activation = Activation::kNone;
  bool gated = false;  // of two equal parts: activation(first) * second
};

// x: [tokens, in]; residual: as y[0], or null; y: [tokens, columns] for each part, or one if it is gated. A residual or
// a norm of the output is only for one output.
void int8_linear(const float* x, const PackedWeight& weight, const Around& around, const float* residual,
                 int64_t tokens, float* const* y, Isa isa, const Parallel& parallel);

// The largest tile of an instruction set, `in` deep (a multiple of 64), again and again on the same data, with nothing
// around it: what the product can reach at most. Returns how many multiplications and additions that were.
int64_t int8_tiles(int64_t in, int64_t times, Isa isa);

}  // namespace rtx
