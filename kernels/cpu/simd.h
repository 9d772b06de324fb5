// Vectors as wide as the registers of an instruction set, and the functions that kernels need of them. Everything here
// is inlined into a function that is compiled for one instruction set. Wider vectors than it has would be taken apart.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#define RTX_INLINE static inline __attribute__((always_inline))
// Where a function sums into registers: with what follows inlined, compilers keep the sums in memory while they grow.
#define RTX_APART __attribute__((noinline))
// A loop over a tile, which holds the sums of one: the same goes for what is still a loop.
#define RTX_FOR(index, count) _Pragma("GCC unroll 8") for (int index = 0; index < (count); ++index)

#if defined(__x86_64__)
#include <immintrin.h>
// Tiles need the operating system's leave, which only Linux is asked for.
#if defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define RTX_HAS_AMX
#endif
#define RTX_AVX2 __attribute__((target("avx2,fma")))
#define RTX_AVXVNNI __attribute__((target("avx2,fma,avxvnni")))
#define RTX_AVX512 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define RTX_AMX   \
  __attribute__(( \
      target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-int8,amx-bf16")))
#endif

namespace rtx {

// What kernels put side by side: as many as the widest registers hold.
constexpr int kLanes = 16;

typedef float Floats4 __attribute__((vector_size(16)));
typedef float Floats8 __attribute__((vector_size(32)));
typedef float Floats16 __attribute__((vector_size(64)));

template <class Floats>
struct Vector;
template <>
struct Vector<Floats4> {
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef int8_t Bytes __attribute__((vector_size(4)));
};
template <>
struct Vector<Floats8> {
  typedef int32_t Ints __attribute__((vector_size(32)));
  typedef int8_t Bytes __attribute__((vector_size(8)));
};
template <>
struct Vector<Floats16> {
  typedef int32_t Ints __attribute__((vector_size(64)));
  typedef int8_t Bytes __attribute__((vector_size(16)));
};
template <class Floats>
using Ints = typename Vector<Floats>::Ints;
template <class Floats>
constexpr int kWidth = int(sizeof(Floats) / sizeof(float));

template <class Floats>
RTX_INLINE Floats load(const float* from) {
  Floats found;
  std::memcpy(&found, from, sizeof found);
  return found;
}

template <class Floats>
RTX_INLINE void store(float* to, Floats values) {
  std::memcpy(to, &values, sizeof values);
}

// The first `count` numbers, or all if there are so many; 0 behind them.
template <class Floats>
RTX_INLINE Floats load_some(const float* from, int64_t count) {
  if (count >= kWidth<Floats>) return load<Floats>(from);
  float some[kWidth<Floats>] = {};
  for (int64_t lane = 0; lane < count; ++lane) some[lane] = from[lane];
  return load<Floats>(some);
}

template <class Floats>
RTX_INLINE void store_some(float* to, Floats values, int64_t count) {
  if (count >= kWidth<Floats>) return store(to, values);
  float some[kWidth<Floats>];
  store(some, values);
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = some[lane];
}

// As `load_some`, of 8-bit integers.
template <class Floats>
RTX_INLINE Floats load_bytes(const int8_t* from, int64_t count) {
  typename Vector<Floats>::Bytes bytes = {};
  if (count >= kWidth<Floats>)
    std::memcpy(&bytes, from, sizeof bytes);
  else
    std::memcpy(&bytes, from, size_t(count));
  return __builtin_convertvector(__builtin_convertvector(bytes, Ints<Floats>), Floats);
}

template <class Floats>
RTX_INLINE Floats select(Ints<Floats> mask, Floats yes, Floats no) {
  return mask ? yes : no;
}

// What a compiler must not know: GCC has an instruction for the larger of two vectors, but compares and chooses where
// it knows one of them.
template <class Floats>
RTX_INLINE Floats hidden(Floats values) {
#if defined(__x86_64__)
  __asm__("" : "+x"(values));
#endif
  return values;
}

// The second where one is NaN.
template <class Floats>
RTX_INLINE Floats larger(Floats a, Floats b) {
  const Floats other = hidden(b);
  return a > other ? a : other;
}

template <class Floats>
RTX_INLINE Floats smaller(Floats a, Floats b) {
  const Floats other = hidden(b);
  return a < other ? a : other;
}

// Four lanes out of both, the second's counted behind the first's.
template <int kA, int kB, int kC, int kD>
RTX_INLINE Floats4 shuffle(Floats4 a, Floats4 b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, kA, kB, kC, kD);
#else
  return __builtin_shuffle(a, b, Ints<Floats4>{kA, kB, kC, kD});
#endif
}

// Lanes that are kStep apart changed for each other.
template <int kStep, class Floats, size_t... kLane>
RTX_INLINE Floats swapped(Floats values, std::index_sequence<kLane...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(values, values, int(kLane ^ kStep)...);
#else
  return __builtin_shuffle(values, Ints<Floats>{int(kLane ^ kStep)...});
#endif
}

template <int kStep, class Floats>
RTX_INLINE float sum_by(Floats values) {
  values += swapped<kStep>(values, std::make_index_sequence<kWidth<Floats>>());
  if constexpr (kStep > 1)
    return sum_by<kStep / 2>(values);
  else
    return values[0];
}

template <class Floats>
RTX_INLINE float sum(Floats values) {
  return sum_by<kWidth<Floats> / 2>(values);
}

template <int kStep, class Floats>
RTX_INLINE float largest_by(Floats values) {
  values = larger(values, swapped<kStep>(values, std::make_index_sequence<kWidth<Floats>>()));
  if constexpr (kStep > 1)
    return largest_by<kStep / 2>(values);
  else
    return values[0];
}

template <class Floats>
RTX_INLINE float largest(Floats values) {
  return largest_by<kWidth<Floats> / 2>(values);
}

// To the nearest whole number, ties to even, for magnitudes below 2^22.
template <class Floats>
RTX_INLINE Floats rounded(Floats values) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: behind it no fraction fits
  return (values + shift) - shift;
}

// e^x with a relative error below 2e-7; 0 below -87.3 and inf above 88.7.
template <class Floats>
RTX_INLINE Floats exponential(Floats x) {
  const Ints<Floats> over = x > 88.72f, under = x < -87.33f;
  const Floats bounded = smaller(larger(x, Floats{} - 87.33f), Floats{} + 88.72f);
  const Floats whole = rounded(bounded * 1.44269504f);
  // ln 2 in two parts: the first has so few bits that its product with `whole` is exact.
  const Floats rest = (bounded - whole * 0.693359375f) + whole * 2.12194440e-4f;
  // Taylor's series to the 7th power: |rest| <= ln 2 / 2, so that what follows is below 6e-9.
  Floats series = rest * (1.0f / 5040) + 1.0f / 720;
  series = series * rest + 1.0f / 120;
  series = series * rest + 1.0f / 24;
  series = series * rest + 1.0f / 6;
  series = series * rest + 0.5f;
  series = series * rest + 1.0f;
  series = series * rest + 1.0f;
  // 2^128 has no bits of its own: the exponent is applied in two halves.
  const Ints<Floats> power = __builtin_convertvector(whole, Ints<Floats>), half = power >> 1;
  Floats found = series * (Floats)((half + 127) << 23);
  found = found * (Floats)((power - half + 127) << 23);
  found = select<Floats>(under, Floats{}, found);
  return select<Floats>(over, Floats{} + __builtin_inff(), select<Floats>(x != x, x, found));
}

// 2^x for x <= 0 with a relative error below 2e-7, and 2^-125 for all that is less: for weights beside a largest one of
// 1. Not for NaN.
template <class Floats>
RTX_INLINE Floats power_of_two(Floats x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23, behind which no fraction fits: the lowest bits are the whole number
  const Floats bounded = larger(x, Floats{} - 125.0f);
  const Floats shifted = bounded + shift;
  const Floats rest = bounded - (shifted - shift);
  // Of degree 5, with the least largest relative error on |rest| <= 1/2 (9e-8) of those that are 1 at 0.
  Floats series = rest * 1.32647273e-3f + 9.67151299e-3f;
  series = series * rest + 5.55073358e-2f;
  series = series * rest + 2.40222424e-1f;
  series = series * rest + 6.93147004e-1f;
  series = series * rest + 1.0f;
  return (Floats)((Ints<Floats>)series + ((Ints<Floats>)shifted << 23));
}

// x * (1 + erf(x / sqrt 2)) / 2, error below 5e-6 + 2e-7 |x|: little beside a step of 8 bits, which is what becomes of
// it. The error function is x times a polynomial in x^2 up to 4.8, and 1 beyond. Of degree 10 in s, which goes from -1
// to 1, with the least largest error of those that are 1 at the end.
template <class Floats>
RTX_INLINE Floats gelu(Floats x) {
  const Floats bounded = smaller(larger(x, Floats{} - 4.8f), Floats{} + 4.8f), half = 0.5f * x;
  const Floats s = bounded * bounded * 0.0868055522f - 1.0f;
  Floats series = s * 0.00288710068f - 0.00838911347f;
  series = series * s + 0.0107854726f;
  series = series * s - 0.0148869734f;
  series = series * s + 0.027727643f;
  series = series * s - 0.0443749465f;
  series = series * s + 0.0614418015f;
  series = series * s - 0.081131883f;
  series = series * s + 0.105808184f;
  series = series * s - 0.145959511f;
  series = series * s + 0.294425577f;
  return half * (series * bounded) + half;
}

template <class Floats>
RTX_INLINE Floats gelu_tanh(Floats x) {
  // tanh(y) = 1 - 2 / (e^2y + 1)
  const Floats y = 1.59576912f * (x + 0.044715f * x * x * x);
  return x - x / (exponential(y) + 1.0f);
}

template <class Floats>
RTX_INLINE Floats silu(Floats x) {
  return x / (1.0f + exponential(-x));
}

}  // namespace rtx
