// The op `packed_attention` with products of AMX's tiles, which multiply bfloat16.
#pragma once

#include "packed_attention.h"

#if defined(__x86_64__)
#include "simd.h"

#if defined(RTX_HAS_AMX)

namespace rtx {

// One sequence's heads that share one of keys. query, y: of its first token and the first such head, tokens
// `shape.heads * shape.width` apart; key, value: of its first token and that head, tokens `shape.key_heads *
// shape.width` apart.
void tiled_attention(const float* query, const float* key, const float* value, int64_t length,
                     const AttentionShape& shape, float* y);

}  // namespace rtx

#endif
#endif
