// The op `int8_linear` of rtx/kernels/int8_linear.py: the contract and the reference are there.
#pragma once

#include <cstdint>
#include <vector>

#include "machine.h"

namespace rtx {

enum class Activation { kNone, kGelu, kGeluTanh, kSilu };

// Bytes up to 255 by weights up to 127, so often that the sum fits into 32 bits.
constexpr int64_t kMostInputs = 65536;

// A weight as the kernels read it: panels of 16 columns, four rows of each together.
struct PackedWeight {
  int64_t in = 0, out = 0, padded_in = 0, padded_out = 0;
  std::vector<int8_t> values;        // [padded_out / 16][padded_in / 4][16][4]
  std::vector<int32_t> offset;       // [padded_out]: 128 * the sum of a column's integers
  std::vector<float> scale, column_sum, bias;  // [padded_out]; bias is 0 where there is none

  // values: [in, out] uint8 with zero point 128; scale, column_sum: [out]; bias: [out] or null.
  PackedWeight(const uint8_t* values, const float* scale, const float* column_sum, const float* bias, int64_t in,
               int64_t out);
};

// x: [tokens, in] to y: [tokens, out].
void int8_linear(const float* x, const PackedWeight& weight, Activation activation, int64_t tokens, float* y, Isa isa,
                 const Parallel& parallel);

}  // namespace rtx
