// The op `packed_pool` of rtx/kernels/packed_pool.py: the contract and the reference are there.
#pragma once

#include <cstdint>

#include "machine.h"

namespace rtx {

enum class Pooling { kCls, kMax, kMean, kMeanSqrtLenTokens, kWeightedMean, kLastToken };

// x: [tokens, width]; offsets: [sequences + 1], where each begins; pooled: [tokens], 0 for a token that is left out, or
// null for none; y: [sequences, width].
void packed_pool(const float* x, int64_t width, const int64_t* offsets, int64_t sequences, const int64_t* pooled,
                 Pooling pooling, float* y, const Parallel& parallel);

}  // namespace rtx
