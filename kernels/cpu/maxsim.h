// The op `maxsim` of rtx/kernels/maxsim.py: the contract and the reference are there.
#pragma once

#include <cstdint>

#include "machine.h"

namespace rtx {

// query: [query_tokens, dim]; documents: [tokens, dim]; offsets: [count + 1], where each document begins; scores:
// [count].
void maxsim(const float* query, int64_t query_tokens, const float* documents, const int64_t* offsets, int64_t count,
            int64_t dim, float* scores, Isa isa, const Parallel& parallel);

}  // namespace rtx
