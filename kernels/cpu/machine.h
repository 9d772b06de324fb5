// What a machine can run, and how work is spread over its threads.
#pragma once

#include <cstdint>
#include <functional>

namespace rtx {

// In the order of preference. Every one gives the same integers.
enum class Isa { kPortable, kAvx2, kAvxVnni, kAvx512Vnni };

// The best that this machine has.
Isa detect_isa();

// Whether it has the 256-bit form of VNNI, which one with AVX-512 may lack.
bool has_avx_vnni();

// Runs fn(0) ... fn(count - 1), in any order, at once where there are threads.
using Parallel = std::function<void(int64_t count, const std::function<void(int64_t)>& fn)>;

}  // namespace rtx
