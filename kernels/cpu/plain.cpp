// Plain functions by which tests and benchmarks reach the kernels, each in one thread.
#include <numeric>

#include "embedding.h"
#include "int8_linear.h"
#include "maxsim.h"
#include "norm.h"
#include "packed_attention.h"
#include "packed_pool.h"
#include "rotary_embedding.h"

#if defined(_WIN32)
#define RTX_EXPORT extern "C" __declspec(dllexport)
#else
#define RTX_EXPORT extern "C" __attribute__((visibility("default")))
#endif

using namespace rtx;

namespace {

void serially(int64_t count, const std::function<void(int64_t)>& fn) {
  for (int64_t index = 0; index < count; ++index) fn(index);
}

// As many sums as hide how long one takes, and no more than the registers hold.
constexpr int kSums = 3;

template <class Floats>
RTX_INLINE float multiply_add(int64_t times) {
  const Floats factor = hidden(Floats{} + 0.5f), term = hidden(Floats{} + 1.0f);
  Floats sums[4][kSums] = {};
  for (int64_t time = 0; time < times; ++time) {
    RTX_FOR (row, 4)
      RTX_FOR (at, kSums) sums[row][at] = sums[row][at] * factor + term;
  }
  Floats total = Floats{};
  RTX_FOR (row, 4)
    RTX_FOR (at, kSums) total += sums[row][at];
  return sum(total);
}

template <class Floats>
RTX_INLINE float read_all(const float* from, int64_t count, int64_t times) {
  constexpr int kAtOnce = 8;
  Ints<Floats> mixed[kAtOnce] = {};
  for (int64_t time = 0; time < times; ++time)
    for (int64_t k = 0; k < count; k += kAtOnce * kWidth<Floats>)
      RTX_FOR (at, kAtOnce) mixed[at] ^= (Ints<Floats>)load<Floats>(from + k + at * kWidth<Floats>);
  for (int at = 1; at < kAtOnce; ++at) mixed[0] ^= mixed[at];
  return sum((Floats)mixed[0]);
}

float multiply_add_portable(int64_t times) { return multiply_add<Floats4>(times); }
float read_portable(const float* from, int64_t count, int64_t times) { return read_all<Floats4>(from, count, times); }
#if defined(__x86_64__)
RTX_AVX2 float multiply_add_avx2(int64_t times) { return multiply_add<Floats8>(times); }
RTX_AVX2 float read_avx2(const float* from, int64_t count, int64_t times) {
  return read_all<Floats8>(from, count, times);
}
RTX_AVX512 float multiply_add_avx512(int64_t times) { return multiply_add<Floats16>(times); }
RTX_AVX512 float read_avx512(const float* from, int64_t count, int64_t times) {
  return read_all<Floats16>(from, count, times);
}
#endif

// Where results go that nobody needs: what gives them must not be left out.
volatile float unused;

}  // namespace

// The instruction set in use: 0 portable, 1 AVX2, 2 AVX-VNNI, 3 AVX-512 VNNI, 4 AVX-512 with AMX.
RTX_EXPORT int rtx_isa() { return int(current_isa()); }

// The best that this machine has.
RTX_EXPORT int rtx_best_isa() { return int(detect_isa()); }

// Use another one. 0 if this machine has it, else 1 and nothing changes.
RTX_EXPORT int rtx_use_isa(int isa) { return use_isa(Isa(isa)) ? 0 : 1; }

// A weight, to be given back; values stay where they are, and bias may be NULL.
RTX_EXPORT PackedWeight* rtx_weight(const int8_t* values, const float* scale, const float* column_sum,
                                    const float* bias, int64_t in, const int64_t* parts, int64_t count) {
  return new PackedWeight(values, scale, column_sum, bias, in, std::vector<int64_t>(parts, parts + count));
}

RTX_EXPORT void rtx_drop_weight(PackedWeight* weight) { delete weight; }

// activation counts as in Activation, norm as in NormKind; residual and norm_bias may be NULL.
RTX_EXPORT void rtx_int8_linear(const float* x, const PackedWeight* weight, int activation, int gated, int norm,
                                int norm_of_output, float epsilon, const float* norm_weight, const float* norm_bias,
                                const float* residual, int64_t tokens, float* const* y) {
  const Around around{
      {NormKind(norm), epsilon, norm_weight, norm_bias}, norm_of_output != 0, Activation(activation), gated != 0};
  int8_linear(x, *weight, around, residual, tokens, y, current_isa(), serially);
}

// added and norm_bias may be NULL.
RTX_EXPORT void rtx_int8_embedding(const int8_t* values, const float* scale, int64_t width, const int64_t* ids,
                                   const float* added, int64_t tokens, int norm, float epsilon,
                                   const float* norm_weight, const float* norm_bias, float* y) {
  int8_embedding(values, scale, width, ids, added, tokens, {NormKind(norm), epsilon, norm_weight, norm_bias}, y,
                 current_isa(), serially);
}

// norm_bias may be NULL.
RTX_EXPORT void rtx_normalize(const float* x, int64_t rows, int64_t width, int norm, float epsilon,
                              const float* norm_weight, const float* norm_bias, float* y) {
  normalize(x, rows, width, {NormKind(norm), epsilon, norm_weight, norm_bias}, y, current_isa(), serially);
}

RTX_EXPORT void rtx_rotary_embedding(const float* x, const float* cos, const float* sin, int64_t tokens, int64_t heads,
                                     int64_t width, float* y) {
  rotary_embedding(x, cos, sin, tokens, heads, width, y, current_isa(), serially);
}

RTX_EXPORT void rtx_packed_attention(const float* query, const float* key, const float* value, const int64_t* offsets,
                                     int64_t sequences, int64_t heads, int64_t key_heads, int64_t width, float scale,
                                     int causal, int64_t window, int bfloat16, float* y) {
  packed_attention(query, key, value, offsets, sequences,
                   AttentionShape{heads, key_heads, width, scale, causal != 0, window, bfloat16 != 0}, y, current_isa(),
                   serially);
}

// pooling counts as in Pooling; pooled may be NULL.
RTX_EXPORT void rtx_packed_pool(const float* x, int64_t width, const int64_t* offsets, int64_t sequences,
                                const int64_t* pooled, int pooling, float* y) {
  packed_pool(x, width, offsets, sequences, pooled, Pooling(pooling), y, serially);
}

RTX_EXPORT void rtx_maxsim(const float* query, int64_t query_tokens, const float* documents, const int64_t* offsets,
                           int64_t count, int64_t dim, float* scores) {
  maxsim(query, query_tokens, documents, offsets, count, dim, scores, current_isa(), serially);
}

// What this machine reaches at most, with nothing but the one thing done. See `int8_tiles`.
RTX_EXPORT int64_t rtx_int8_tiles(int64_t in, int64_t times) { return int8_tiles(in, times, current_isa()); }

// Independent multiplications with additions in float32, in registers. Returns how many of both together.
RTX_EXPORT int64_t rtx_multiply_add(int64_t times) {
  auto* run = multiply_add_portable;
  int64_t width = kWidth<Floats4>;
#if defined(__x86_64__)
  if (current_isa() >= Isa::kAvx512Vnni) {
    run = multiply_add_avx512;
    width = kWidth<Floats16>;
  } else if (current_isa() >= Isa::kAvx2) {
    run = multiply_add_avx2;
    width = kWidth<Floats8>;
  }
#endif
  unused = run(times);
  return 2 * times * 4 * kSums * width;
}

// Reads `count` numbers, a multiple of 128, so many times.
RTX_EXPORT void rtx_read(const float* from, int64_t count, int64_t times) {
  auto* run = read_portable;
#if defined(__x86_64__)
  if (current_isa() >= Isa::kAvx512Vnni)
    run = read_avx512;
  else if (current_isa() >= Isa::kAvx2)
    run = read_avx2;
#endif
  unused = run(from, count, times);
}

// Functions of vectors: 0 e^x, 1 gelu, 2 gelu_tanh, 3 silu; count a multiple of 4.
RTX_EXPORT void rtx_map(int function, const float* x, int64_t count, float* y) {
  for (int64_t at = 0; at < count; at += 4) {
    const Floats4 values = load<Floats4>(x + at);
    switch (function) {
      case 0:
        store(y + at, exponential(values));
        break;
      case 1:
        store(y + at, gelu(values));
        break;
      case 2:
        store(y + at, gelu_tanh(values));
        break;
      default:
        store(y + at, silu(values));
        break;
    }
  }
}
