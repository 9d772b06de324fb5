#include "machine.h"

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>

#include "simd.h"
#endif
#if defined(RTX_HAS_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rtx {

namespace {

std::atomic<int> isa_in_use{-1};

#if defined(__x86_64__)

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// The 256-bit form of VNNI, which machines with AVX-512 may lack.
bool has_avx_vnni() {
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  // Not every compiler's __builtin_cpu_supports knows its name: bit 4 of EAX in leaf 7, subleaf 1.
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1) != 0;
}

bool has_avx512_vnni() {
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_amx() {
#if defined(RTX_HAS_AMX)
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  // Leaf 7: bits 22 (AMX-BF16), 24 (AMX-TILE) and 25 (AMX-INT8) of EDX, and bit 5 (AVX512_BF16) of EAX in subleaf 1.
  if (!has_avx512_vnni() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx >> 22 & 13) != 13) return false;
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || (eax >> 5 & 1) == 0) return false;
  // The process asks for the registers, which are large: ARCH_REQ_XCOMP_PERM for XTILEDATA (docs.kernel.org,
  // arch/x86/xstate).
  static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return granted;
#else
  return false;
#endif
}

#endif  // __x86_64__

bool has(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx512Amx:
      return has_amx();
    case Isa::kAvx512Vnni:
      return has_avx512_vnni();
    case Isa::kAvxVnni:
      return has_avx_vnni();
    case Isa::kAvx2:
      return has_avx2();
#endif
    default:
      return isa == Isa::kPortable;
  }
}

}  // namespace

Isa detect_isa() {
  for (const Isa isa : {Isa::kAvx512Amx, Isa::kAvx512Vnni, Isa::kAvxVnni, Isa::kAvx2})
    if (has(isa)) return isa;
  return Isa::kPortable;
}

Isa current_isa() {
  int found = isa_in_use.load(std::memory_order_relaxed);
  if (found < 0) isa_in_use = found = int(detect_isa());
  return Isa(found);
}

bool use_isa(Isa isa) {
  if (!has(isa)) return false;
  isa_in_use = int(isa);
  return true;
}

}  // namespace rtx
