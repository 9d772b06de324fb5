// The op `packed_attention` of rtx/kernels/packed_attention.py: the contract and the reference are there.
#pragma once

#include <algorithm>
#include <cstdint>

#include "machine.h"

namespace rtx {

// Below every score, and still a number.
constexpr float kUnseen = -3e38f;

struct AttentionShape {
  int64_t heads, key_heads, width;  // heads is a multiple of key_heads
  float scale;
  bool causal;
  int64_t window;  // keys at most so far away are seen; negative for all
  bool bfloat16;   // whether weights and values may be rounded to it

  // Which keys a token sees: from the first to before the second.
  int64_t low(int64_t token) const { return window < 0 ? 0 : std::max<int64_t>(0, token - window); }
  int64_t high(int64_t token, int64_t length) const {
    const int64_t end = causal ? token + 1 : length;
    return window < 0 ? end : std::min(end, token + window + 1);
  }
};

// query, y: [tokens, heads, width]; key, value: [tokens, key_heads, width]; offsets: [sequences + 1], where each
// begins.
void packed_attention(const float* query, const float* key, const float* value, const int64_t* offsets,
                      int64_t sequences, const AttentionShape& shape, float* y, Isa isa, const Parallel& parallel);

}  // namespace rtx
