// The op `int8_embedding` of rtx/kernels/int8_embedding.py: the contract and the reference are there.
#pragma once

#include <cstdint>

#include "machine.h"
#include "norm.h"

namespace rtx {

// values: [rows, width] with a scale [rows] each; ids: [tokens], each a row; added: [tokens, width] or null;
// y: [tokens, width].
void int8_embedding(const int8_t* values, const float* scale, int64_t width, const int64_t* ids, const float* added,
                    int64_t tokens, const Norm& norm, float* y, Isa isa, const Parallel& parallel);

}  // namespace rtx
