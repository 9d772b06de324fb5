#include "norm.h"

#include <algorithm>

namespace rtx {
namespace {

void rows_portable(const float* x, int64_t rows, int64_t width, const Norm& norm, float* y) {
  for (int64_t row = 0; row < rows; ++row) normalize_row<Floats4>(x + row * width, width, norm, y + row * width);
}
#if defined(__x86_64__)
RTX_AVX2 void rows_avx2(const float* x, int64_t rows, int64_t width, const Norm& norm, float* y) {
  for (int64_t row = 0; row < rows; ++row) normalize_row<Floats8>(x + row * width, width, norm, y + row * width);
}
RTX_AVX512 void rows_avx512(const float* x, int64_t rows, int64_t width, const Norm& norm, float* y) {
  for (int64_t row = 0; row < rows; ++row) normalize_row<Floats16>(x + row * width, width, norm, y + row * width);
}
#endif

}  // namespace

void normalize(const float* x, int64_t rows, int64_t width, const Norm& norm, float* y, Isa isa,
               const Parallel& parallel) {
  const int64_t block = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(width, 1));
  parallel((rows + block - 1) / block, [&](int64_t at) {
    const int64_t first = at * block, count = std::min(block, rows - first);
    const float* from = x + first * width;
    float* to = y + first * width;
#if defined(__x86_64__)
    if (isa >= Isa::kAvx512Vnni) return rows_avx512(from, count, width, norm, to);
    if (isa >= Isa::kAvx2) return rows_avx2(from, count, width, norm, to);
#endif
    rows_portable(from, count, width, norm, to);
  });
}

}  // namespace rtx
