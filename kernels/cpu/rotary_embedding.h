// The op `rotary_embedding` of rtx/kernels/rotary_embedding.py: the contract and the reference are there.
#pragma once

#include <cstdint>

#include "machine.h"

namespace rtx {

// x, y: [tokens, heads, width]; cos, sin: [tokens, width]; width is even.
void rotary_embedding(const float* x, const float* cos, const float* sin, int64_t tokens, int64_t heads, int64_t width,
                      float* y, Isa isa, const Parallel& parallel);

}  // namespace rtx
