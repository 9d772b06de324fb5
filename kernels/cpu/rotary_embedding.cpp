#include "rotary_embedding.h"

#include <algorithm>

#include "simd.h"

namespace rtx {
namespace {

template <class Floats>
RTX_INLINE void rotate(const float* x, const float* cos, const float* sin, int64_t heads, int64_t width, float* y) {
  const int64_t half = width / 2;
  for (int64_t head = 0; head < heads; ++head, x += width, y += width)
    for (int64_t at = 0; at < half; at += kWidth<Floats>) {
      const int64_t count = half - at;
      const Floats first = load_some<Floats>(x + at, count), second = load_some<Floats>(x + half + at, count);
      store_some(y + at, first * load_some<Floats>(cos + at, count) - second * load_some<Floats>(sin + at, count),
                 count);
      store_some(y + half + at,
                 second * load_some<Floats>(cos + half + at, count) + first * load_some<Floats>(sin + half + at, count),
                 count);
    }
}

void rotate_portable(const float* x, const float* cos, const float* sin, int64_t heads, int64_t width, float* y) {
  rotate<Floats4>(x, cos, sin, heads, width, y);
}
#if defined(__x86_64__)
RTX_AVX2 void rotate_avx2(const float* x, const float* cos, const float* sin, int64_t heads, int64_t width, float* y) {
  rotate<Floats8>(x, cos, sin, heads, width, y);
}
RTX_AVX512 void rotate_avx512(const float* x, const float* cos, const float* sin, int64_t heads, int64_t width,
                              float* y) {
  rotate<Floats16>(x, cos, sin, heads, width, y);
}
#endif

}  // namespace

void rotary_embedding(const float* x, const float* cos, const float* sin, int64_t tokens, int64_t heads, int64_t width,
                      float* y, Isa isa, const Parallel& parallel) {
  auto* rotate = rotate_portable;
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512Vnni)
    rotate = rotate_avx512;
  else if (isa >= Isa::kAvx2)
    rotate = rotate_avx2;
#endif
  const int64_t row = heads * width, block = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(row, 1));
  parallel((tokens + block - 1) / block, [&](int64_t part) {
    for (int64_t token = part * block; token < std::min(tokens, (part + 1) * block); ++token)
      rotate(x + token * row, cos + token * width, sin + token * width, heads, width, y + token * row);
  });
}

}  // namespace rtx
