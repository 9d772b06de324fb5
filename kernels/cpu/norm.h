// LayerNorm and RMSNorm of rows: the op `rms_norm` of rtx/kernels/norm.py, and what other kernels do on the way in or
// out.
#pragma once

#include <cmath>
#include <cstdint>

#include "machine.h"
#include "simd.h"

namespace rtx {

enum class NormKind { kNone, kLayer, kRms };

struct Norm {
  NormKind kind = NormKind::kNone;
  float epsilon = 0.0f;
  const float* weight = nullptr;  // [width]
  const float* bias = nullptr;    // [width], or null
};

// One row, [width] to [width], which may be the same.
template <class Floats>
RTX_INLINE void normalize_row(const float* x, int64_t width, const Norm& norm, float* y) {
  constexpr int kWide = kWidth<Floats>;
  const int64_t whole = width / kWide * kWide;
  float mean = 0.0f;
  if (norm.kind == NormKind::kLayer) {
    Floats sums = Floats{};
    for (int64_t at = 0; at < whole; at += kWide) sums += load<Floats>(x + at);
    float total = sum(sums);
    for (int64_t at = whole; at < width; ++at) total += x[at];
    mean = total / float(width);
  }
  Floats sums = Floats{};
  for (int64_t at = 0; at < whole; at += kWide) {
    const Floats off = load<Floats>(x + at) - mean;
    sums += off * off;
  }
  float total = sum(sums);
  for (int64_t at = whole; at < width; ++at) total += (x[at] - mean) * (x[at] - mean);
  const float factor = 1.0f / std::sqrt(total / float(width) + norm.epsilon);
  for (int64_t at = 0; at < width; at += kWide) {
    const int64_t count = width - at;
    const Floats weight = load_some<Floats>(norm.weight + at, count);
    const Floats bias = norm.bias == nullptr ? Floats{} : load_some<Floats>(norm.bias + at, count);
    store_some(y + at, (load_some<Floats>(x + at, count) - mean) * factor * weight + bias, count);
  }
}

// x, y: [rows, width].
void normalize(const float* x, int64_t rows, int64_t width, const Norm& norm, float* y, Isa isa,
               const Parallel& parallel);

}  // namespace rtx
