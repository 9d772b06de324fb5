#include "packed_attention.h"

#include <algorithm>
#include <vector>

#include "simd.h"
#include "tiled_attention.h"

namespace rtx {
namespace {

#if defined(RTX_HAS_AMX)
constexpr int64_t kLeastTiled = 64;
#endif

// 16 of it, 32 of what is above every score, 16 of it. Infinity, so that what was NaN is not finite afterwards either.
constexpr struct Bounds {
  constexpr Bounds() : bounds() {
    for (int at = 0; at < 4 * kLanes; ++at) bounds[at] = at < kLanes || at >= 3 * kLanes ? kUnseen : __builtin_inff();
  }
  float bounds[4 * kLanes];
} kAllBounds;
constexpr const float* kBounds = kAllBounds.bounds;

// One head of one sequence, brought into the order in which it is read.
struct Head {
  const float* query;  // of the first token
  int64_t query_stride;
  const float* keys;    // [panels][width][16], 0 behind the last
  const float* values;  // of the first token: rows of a multiple of 16 numbers
  int64_t value_stride;
  int64_t length, width;
  const AttentionShape& shape;
  float* y;
  int64_t y_stride;
};

// Vectors beside each other that 16 numbers take.
template <class Floats>
constexpr int kParts = kLanes / kWidth<Floats>;

// scores[row][16 keys of each of kPanels panels] = factor * query[row] . key
template <class Floats, int kRows, int kPanels>
RTX_INLINE void dot(const Head& head, int64_t first, int64_t panel, float factor, float* scores, int64_t stride) {
  constexpr int kVectors = kPanels * kParts<Floats>;
  const float* query = head.query + first * head.query_stride;
  const float* keys = head.keys + panel * head.width * kLanes;
  Floats sums[kRows][kVectors];
  RTX_FOR (row, kRows)
    RTX_FOR (at, kVectors) sums[row][at] = Floats{};
  for (int64_t k = 0; k < head.width; ++k) {
    Floats some[kVectors];
    RTX_FOR (at, kVectors)
      some[at] =
          load<Floats>(keys + (at / kParts<Floats> * head.width + k) * kLanes + at % kParts<Floats> * kWidth<Floats>);
    RTX_FOR (row, kRows)
      RTX_FOR (at, kVectors) sums[row][at] += query[row * head.query_stride + k] * some[at];
  }
  RTX_FOR (row, kRows)
    RTX_FOR (at, kVectors) store(scores + row * stride + panel * kLanes + at * kWidth<Floats>, sums[row][at] * factor);
}

// y[row][kColumns * 16 numbers] = factor[row] * sum of weights[row][key] * values[key]
template <class Floats, int kRows, int kColumns>
RTX_INLINE void mix(const Head& head, int64_t first, int64_t column, int64_t low, int64_t high, const float* weights,
                    int64_t stride, const float* factors) {
  constexpr int kVectors = kColumns * kParts<Floats>;
  Floats sums[kRows][kVectors];
  RTX_FOR (row, kRows)
    RTX_FOR (at, kVectors) sums[row][at] = Floats{};
  for (int64_t key = low; key < high; ++key) {
    Floats some[kVectors];
    RTX_FOR (at, kVectors)
      some[at] = load<Floats>(head.values + key * head.value_stride + column + at * kWidth<Floats>);
    RTX_FOR (row, kRows)
      RTX_FOR (at, kVectors) sums[row][at] += weights[row * stride + key] * some[at];
  }
  RTX_FOR (row, kRows)
    RTX_FOR (at, kVectors)
      store_some(head.y + (first + row) * head.y_stride + column + at * kWidth<Floats>, sums[row][at] * factors[row],
                 head.width - column - at * kWidth<Floats>);
}

// Scores to 2^(score - the largest) over keys low ... high - 1, next to nothing elsewhere in those panels; 1 / their
// sum.
template <class Floats>
RTX_INLINE float softmax(float* scores, int64_t low, int64_t high) {
  const int64_t begin = low / kLanes * kLanes, end = (high + kLanes - 1) / kLanes * kLanes;
  Floats most = Floats{} + kUnseen, spoilt = Floats{};
  for (int64_t key = begin; key < end; key += kWidth<Floats>) {
    Floats some = load<Floats>(scores + key);
    if (key < low || key + kWidth<Floats> > high) {
      // Bounded by what is above every score in lanes that are seen, and below in the others.
      const int64_t unseen = std::clamp<int64_t>(low - key, 0, kLanes),
                    seen = std::clamp<int64_t>(high - key, 0, kLanes);
      some = smaller(some, load<Floats>(kBounds + kLanes - unseen));
      some = smaller(some, load<Floats>(kBounds + 3 * kLanes - seen));
      store(scores + key, some);
    }
    most = larger(some, most);
    spoilt += some * 0.0f;  // 0, or NaN of what is not finite
  }
  const float top = largest(most);
  Floats total = spoilt;
  for (int64_t key = begin; key < end; key += kWidth<Floats>) {
    const Floats some = power_of_two(load<Floats>(scores + key) - top);
    store(scores + key, some);
    total += some;
  }
  return 1.0f / sum(total);
}

template <class Floats, int kRows, int kAtOnce>
RTX_INLINE void attend_rows(const Head& head, int64_t first, float* scores, int64_t stride) {
  const AttentionShape& shape = head.shape;
  const int64_t low = shape.low(first), high = shape.high(first + kRows - 1, head.length);
  const int64_t end = (high + kLanes - 1) / kLanes;
  const float factor = shape.scale * 1.44269504f;  // powers of 2 in place of e
  int64_t panel = low / kLanes;
  for (; panel + kAtOnce <= end; panel += kAtOnce)
    dot<Floats, kRows, kAtOnce>(head, first, panel, factor, scores, stride);
  for (; panel < end; ++panel) dot<Floats, kRows, 1>(head, first, panel, factor, scores, stride);
  float factors[kRows];
  for (int row = 0; row < kRows; ++row) {
    float* own = scores + row * stride;
    const int64_t own_low = shape.low(first + row), own_high = shape.high(first + row, head.length);
    factors[row] = softmax<Floats>(own, own_low, own_high);
    // Panels that other rows see and this one does not.
    for (int64_t key = low; key < own_low / kLanes * kLanes; ++key) own[key] = 0.0f;
    for (int64_t key = (own_high + kLanes - 1) / kLanes * kLanes; key < high; ++key) own[key] = 0.0f;
  }
  int64_t column = 0;
  for (; column + kAtOnce * kLanes <= head.width; column += kAtOnce * kLanes)
    mix<Floats, kRows, kAtOnce>(head, first, column, low, high, scores, stride, factors);
  for (; column < head.width; column += kLanes)
    mix<Floats, kRows, 1>(head, first, column, low, high, scores, stride, factors);
}

// So many rows at once, and so many panels or columns of 16, that their sums fill the registers. Where rows are left
// over, the last so many are computed, some of them again: each row is computed by itself.
template <class Floats, int kRows, int kAtOnce>
RTX_INLINE void attend(const Head& head, float* scores, int64_t stride) {
  if (head.length >= kRows) {
    for (int64_t token = 0; token < head.length; token += kRows)
      attend_rows<Floats, kRows, kAtOnce>(head, std::min(token, head.length - kRows), scores, stride);
  } else {
    for (int64_t token = 0; token < head.length; ++token) attend_rows<Floats, 1, kAtOnce>(head, token, scores, stride);
  }
}

void attend_portable(const Head& head, float* scores, int64_t stride) { attend<Floats4, 2, 1>(head, scores, stride); }
#if defined(__x86_64__)
RTX_AVX2 void attend_avx2(const Head& head, float* scores, int64_t stride) {
  attend<Floats8, 6, 1>(head, scores, stride);
}
RTX_AVX512 void attend_avx512(const Head& head, float* scores, int64_t stride) {
  attend<Floats16, 8, 2>(head, scores, stride);
}
#endif

// keys [length][stride] to panels [panels][width][16], 0 behind the last.
void pack_keys(const float* from, int64_t stride, int64_t length, int64_t width, float* to) {
  const int64_t panels = (length + kLanes - 1) / kLanes;
  std::fill(to + (panels - 1) * width * kLanes, to + panels * width * kLanes, 0.0f);
  for (int64_t token = 0; token < length; token += 4) {
    float* lanes = to + token / kLanes * width * kLanes + token % kLanes;
    const float* rows = from + token * stride;
    int64_t at = 0;
    if (token + 4 <= length)
      for (; at + 4 <= width; at += 4) {
        // Four by four.
        const Floats4 a = load<Floats4>(rows + at), b = load<Floats4>(rows + stride + at);
        const Floats4 c = load<Floats4>(rows + 2 * stride + at), d = load<Floats4>(rows + 3 * stride + at);
        const Floats4 low_ab = shuffle<0, 4, 1, 5>(a, b), high_ab = shuffle<2, 6, 3, 7>(a, b);
        const Floats4 low_cd = shuffle<0, 4, 1, 5>(c, d), high_cd = shuffle<2, 6, 3, 7>(c, d);
        store(lanes + at * kLanes, shuffle<0, 1, 4, 5>(low_ab, low_cd));
        store(lanes + (at + 1) * kLanes, shuffle<2, 3, 6, 7>(low_ab, low_cd));
        store(lanes + (at + 2) * kLanes, shuffle<0, 1, 4, 5>(high_ab, high_cd));
        store(lanes + (at + 3) * kLanes, shuffle<2, 3, 6, 7>(high_ab, high_cd));
      }
    for (int64_t row = 0; row < std::min<int64_t>(4, length - token); ++row)
      for (int64_t rest = at; rest < width; ++rest) lanes[rest * kLanes + row] = rows[row * stride + rest];
  }
}

}  // namespace

void packed_attention(const float* query, const float* key, const float* value, const int64_t* offsets,
                      int64_t sequences, const AttentionShape& shape, float* y, Isa isa, const Parallel& parallel) {
  const int64_t heads = shape.heads, width = shape.width, row = shape.key_heads * width;
  const int64_t padded_width = (width + kLanes - 1) / kLanes * kLanes;
  const int64_t groups = heads / shape.key_heads;
  auto* attend = attend_portable;
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512Vnni)
    attend = attend_avx512;
  else if (isa >= Isa::kAvx2)
    attend = attend_avx2;
#endif
  // A task has the heads that share keys, so that these are put in order once.
  parallel(sequences * shape.key_heads, [&](int64_t task) {
    const int64_t sequence = task / shape.key_heads, key_head = task % shape.key_heads;
    const int64_t first = offsets[sequence], length = offsets[sequence + 1] - first;
    if (length == 0) return;
#if defined(RTX_HAS_AMX)
    // With less, what surrounds the products costs more than they do.
    if (shape.bfloat16 && isa == Isa::kAvx512Amx && length >= kLeastTiled) {
      const int64_t start = (first * heads + key_head * groups) * width, key_start = first * row + key_head * width;
      return tiled_attention(query + start, key + key_start, value + key_start, length, shape, y + start);
    }
#endif
    const int64_t panels = (length + kLanes - 1) / kLanes, stride = panels * kLanes;
    thread_local std::vector<float> scratch;
    const int64_t key_floats = panels * width * kLanes;
    // Rows that are a multiple of so many bytes apart share a few places of a cache, and push each other out of it.
    const bool crowded = length > 64 && row * int64_t(sizeof(float)) % 2048 == 0;
    const int64_t value_floats = width == padded_width && !crowded ? 0 : length * padded_width;
    // From the begin of a line of a cache on: a vector across two of them takes two loads.
    scratch.resize(size_t(key_floats + value_floats + 8 * stride + kLanes));
    float* const keys = scratch.data() + (-reinterpret_cast<uintptr_t>(scratch.data()) & 63) / sizeof(float);
    float *copied = keys + key_floats, *scores = copied + value_floats;
    pack_keys(key + first * row + key_head * width, row, length, width, keys);
    const float* values = value + first * row + key_head * width;
    if (value_floats > 0) {
      for (int64_t token = 0; token < length; ++token) {
        float* to = copied + token * padded_width;
        std::copy(values + token * row, values + token * row + width, to);
        std::fill(to + width, to + padded_width, 0.0f);
      }
      values = copied;
    }
    for (int64_t head = key_head * groups; head < (key_head + 1) * groups; ++head) {
      const int64_t start = (first * heads + head) * width;
      attend({query + start, heads * width, keys, values, value_floats > 0 ? padded_width : row, length, width, shape,
              y + start, heads * width},
             scores, stride);
    }
  });
}

}  // namespace rtx
