#include "maxsim.h"

#include <algorithm>
#include <vector>

#include "simd.h"

namespace rtx {
namespace {

// Tokens of the query lie side by side, so that the largest product of each is found lane by lane, and documents are
// read as they are.
struct Query {
  const float* panels;  // [panels][dim][16], 0 behind the last token
  int64_t tokens, dim;
};

template <class Floats>
constexpr int kParts = kLanes / kWidth<Floats>;

// The largest products so far, and 0, or NaN where a product was not finite.
template <class Floats, int kVectors>
struct Best {
  Floats most[kVectors], spoilt[kVectors];
};

// kRows tokens of a document by kPanels panels of the query.
template <class Floats, int kRows, int kPanels>
RTX_INLINE void meet(const float* panels, int64_t dim, const float* rows,
                     Best<Floats, kPanels * kParts<Floats>>& best) {
  constexpr int kVectors = kPanels * kParts<Floats>;
  Floats sums[kRows][kVectors];
  RTX_FOR (row, kRows)
    RTX_FOR (at, kVectors) sums[row][at] = Floats{};
  for (int64_t k = 0; k < dim; ++k) {
    // The rows behind these: so many side by side are more than a processor sees coming.
    __builtin_prefetch(rows + kRows * dim + k * kRows);
    Floats some[kVectors];
    RTX_FOR (at, kVectors)
      some[at] = load<Floats>(panels + (at / kParts<Floats> * dim + k) * kLanes + at % kParts<Floats> * kWidth<Floats>);
    RTX_FOR (row, kRows)
      RTX_FOR (at, kVectors) sums[row][at] += rows[row * dim + k] * some[at];
  }
  RTX_FOR (row, kRows)
    RTX_FOR (at, kVectors) {
      best.most[at] = larger(sums[row][at], best.most[at]);
      best.spoilt[at] += sums[row][at] * 0.0f;
    }
}

// A document with at least one token, against kPanels panels: largest[16 * kPanels]. Where rows are left over, the last
// kRows are taken, some of them again, which changes no maximum.
template <class Floats, int kRows, int kPanels>
RTX_INLINE void meet_all(const float* panels, int64_t dim, const float* document, int64_t length, float* largest) {
  constexpr int kVectors = kPanels * kParts<Floats>;
  Best<Floats, kVectors> best;
  RTX_FOR (at, kVectors) {
    best.most[at] = Floats{} - __builtin_inff();
    best.spoilt[at] = Floats{};
  }
  if (length >= kRows) {
    for (int64_t token = 0; token < length; token += kRows)
      meet<Floats, kRows, kPanels>(panels, dim, document + std::min(token, length - kRows) * dim, best);
  } else {
    for (int64_t token = 0; token < length; ++token)
      meet<Floats, 1, kPanels>(panels, dim, document + token * dim, best);
  }
  RTX_FOR (at, kVectors) store(largest + at * kWidth<Floats>, best.most[at] + best.spoilt[at]);
}

// So many rows and panels at once that their sums fill the registers.
template <class Floats, int kRows, int kAtOnce>
RTX_INLINE float score(const Query& query, const float* document, int64_t length) {
  if (length == 0) return 0.0f;
  float total = 0.0f, largest[kAtOnce * kLanes];
  int64_t token = 0;
  for (; token + (kAtOnce - 1) * kLanes < query.tokens; token += kAtOnce * kLanes) {
    meet_all<Floats, kRows, kAtOnce>(query.panels + token * query.dim, query.dim, document, length, largest);
    const int64_t count = std::min<int64_t>(kAtOnce * kLanes, query.tokens - token);
    for (int64_t at = 0; at < count; ++at) total += largest[at];
  }
  for (; token < query.tokens; token += kLanes) {
    meet_all<Floats, kRows, 1>(query.panels + token * query.dim, query.dim, document, length, largest);
    const int64_t count = std::min<int64_t>(kLanes, query.tokens - token);
    for (int64_t at = 0; at < count; ++at) total += largest[at];
  }
  return total;
}

float score_portable(const Query& query, const float* document, int64_t length) {
  return score<Floats4, 2, 1>(query, document, length);
}
#if defined(__x86_64__)
RTX_AVX2 float score_avx2(const Query& query, const float* document, int64_t length) {
  return score<Floats8, 6, 1>(query, document, length);
}
RTX_AVX512 float score_avx512(const Query& query, const float* document, int64_t length) {
  return score<Floats16, 8, 2>(query, document, length);
}
#endif

}  // namespace

void maxsim(const float* query, int64_t query_tokens, const float* documents, const int64_t* offsets, int64_t count,
            int64_t dim, float* scores, Isa isa, const Parallel& parallel) {
  auto* score = score_portable;
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512Vnni)
    score = score_avx512;
  else if (isa >= Isa::kAvx2)
    score = score_avx2;
#endif
  const int64_t panels = (query_tokens + kLanes - 1) / kLanes;
  // At the begin of a line of a cache: a vector across two of them takes two loads.
  std::vector<float> memory(size_t(panels * dim * kLanes) + kLanes);
  float* const packed = memory.data() + (-reinterpret_cast<uintptr_t>(memory.data()) & 63) / sizeof(float);
  for (int64_t token = 0; token < query_tokens; ++token)
    for (int64_t k = 0; k < dim; ++k)
      packed[(token / kLanes * dim + k) * kLanes + token % kLanes] = query[token * dim + k];
  const Query in_panels{packed, query_tokens, dim};
  const int64_t work = offsets[count] * dim * panels;
  const int64_t parts = std::clamp<int64_t>(work / kWorthAThread, 1, std::max<int64_t>(count, 1));
  parallel(parts, [&](int64_t part) {
    for (int64_t document = count * part / parts; document < count * (part + 1) / parts; ++document)
      scores[document] =
          score(in_panels, documents + offsets[document] * dim, offsets[document + 1] - offsets[document]);
  });
}

}  // namespace rtx
