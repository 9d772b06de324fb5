#include "embedding.h"

#include <algorithm>

namespace rtx {
namespace {

template <class Floats>
RTX_INLINE void embed_row(const int8_t* values, float scale, const float* added, int64_t width, const Norm& norm,
                          float* y) {
  for (int64_t at = 0; at < width; at += kWidth<Floats>) {
    const int64_t count = width - at;
    Floats found = load_bytes<Floats>(values + at, count) * scale;
    if (added != nullptr) found += load_some<Floats>(added + at, count);
    store_some(y + at, found, count);
  }
  if (norm.kind != NormKind::kNone) normalize_row<Floats>(y, width, norm, y);
}

void row_portable(const int8_t* values, float scale, const float* added, int64_t width, const Norm& norm, float* y) {
  embed_row<Floats4>(values, scale, added, width, norm, y);
}
#if defined(__x86_64__)
RTX_AVX2 void row_avx2(const int8_t* values, float scale, const float* added, int64_t width, const Norm& norm,
                       float* y) {
  embed_row<Floats8>(values, scale, added, width, norm, y);
}
RTX_AVX512 void row_avx512(const int8_t* values, float scale, const float* added, int64_t width, const Norm& norm,
                           float* y) {
  embed_row<Floats16>(values, scale, added, width, norm, y);
}
#endif

}  // namespace

void int8_embedding(const int8_t* values, const float* scale, int64_t width, const int64_t* ids, const float* added,
                    int64_t tokens, const Norm& norm, float* y, Isa isa, const Parallel& parallel) {
  auto* row = row_portable;
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512Vnni)
    row = row_avx512;
  else if (isa >= Isa::kAvx2)
    row = row_avx2;
#endif
  const int64_t block = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(width, 1));
  parallel((tokens + block - 1) / block, [&](int64_t part) {
    for (int64_t token = part * block; token < std::min(tokens, (part + 1) * block); ++token)
      row(values + ids[token] * width, scale[ids[token]], added == nullptr ? nullptr : added + token * width, width,
          norm, y + token * width);
  });
}

}  // namespace rtx
