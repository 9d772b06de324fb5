// What a machine can run, and how work is spread over its threads.
#pragma once

#include <cstdint>
#include <functional>

namespace rtx {

// In the order of preference. Every one gives the same integers.
enum class Isa { kPortable, kAvx2, kAvxVnni, kAvx512Vnni, kAvx512Amx };

// The best that this machine has.
Isa detect_isa();

// What kernels use: the best, or what was chosen.
Isa current_isa();

// Choose another one, if this machine has it; tests and benchmarks do.
bool use_isa(Isa isa);

// Numbers read or written once that a thread is worth waking for.
constexpr int64_t kWorthAThread = 32768;

// Runs fn(0) ... fn(count - 1), in any order, at once where there are threads.
using Parallel = std::function<void(int64_t count, const std::function<void(int64_t)>& fn)>;

}  // namespace rtx
