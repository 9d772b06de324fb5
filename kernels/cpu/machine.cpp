#include "machine.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace rtx {

bool has_avx_vnni() {
#if defined(__x86_64__)
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  // Not every compiler's __builtin_cpu_supports knows its name: bit 4 of EAX in leaf 7, subleaf 1.
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1) != 0;
#else
  return false;
#endif
}

Isa detect_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::kAvx512Vnni;
  if (has_avx_vnni()) return Isa::kAvxVnni;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

}  // namespace rtx
