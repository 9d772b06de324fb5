// The op `packed_attention` of rtx/kernels/packed_attention.py: the contract and the reference are there.
#pragma once

#include <cstdint>

#include "machine.h"

namespace rtx {

struct AttentionShape {
  int64_t heads, key_heads, width;  // heads is a multiple of key_heads
  float scale;
  bool causal;
  int64_t window;  // keys at most so far away are seen; negative for all
};

// query, y: [tokens, heads, width]; key, value: [tokens, key_heads, width]; offsets: [sequences + 1], where each
// begins.
void packed_attention(const float* query, const float* key, const float* value, const int64_t* offsets,
                      int64_t sequences, const AttentionShape& shape, float* y, Isa isa, const Parallel& parallel);

}  // namespace rtx
