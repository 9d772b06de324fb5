#include "packed_attention.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "simd.h"

namespace rtx {
namespace {

// One head of one sequence, brought into the order in which it is read.
struct Head {
  const float* query;  // of the first token
  int64_t query_stride;
  const float* keys;    // [panels][width][16], 0 behind the last
  const float* values;  // [length][padded_width]
  int64_t length, width, padded_width;
  const AttentionShape& shape;
  float* y;
  int64_t y_stride;
};

// Vectors beside each other that 16 numbers take.
template <class Floats>
constexpr int kParts = kLanes / kWidth<Floats>;

// scores[row][16 keys of each panel] = query[row] . key
template <class Floats, int kRows>
RTX_INLINE void dot(const Head& head, int64_t first, int64_t first_panel, int64_t end_panel, float* scores,
                    int64_t stride) {
  const float* query = head.query + first * head.query_stride;
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    const float* keys = head.keys + panel * head.width * kLanes;
    Floats sums[kRows][kParts<Floats>];
    RTX_UNROLL
    for (int row = 0; row < kRows; ++row)
      RTX_UNROLL
      for (int part = 0; part < kParts<Floats>; ++part) sums[row][part] = Floats{};
    for (int64_t at = 0; at < head.width; ++at) {
      RTX_UNROLL
      for (int part = 0; part < kParts<Floats>; ++part) {
        const Floats some = load<Floats>(keys + at * kLanes + part * kWidth<Floats>);
        RTX_UNROLL
        for (int row = 0; row < kRows; ++row) sums[row][part] += query[row * head.query_stride + at] * some;
      }
    }
    RTX_UNROLL
    for (int row = 0; row < kRows; ++row)
      RTX_UNROLL
      for (int part = 0; part < kParts<Floats>; ++part)
        store(scores + row * stride + panel * kLanes + part * kWidth<Floats>, sums[row][part]);
  }
}

// y[row] = sum of weights[row][key] * values[key]
template <class Floats, int kRows>
RTX_INLINE void mix(const Head& head, int64_t first, int64_t low, int64_t high, const float* weights, int64_t stride,
                    const float* factors) {
  for (int64_t column = 0; column < head.padded_width; column += kLanes) {
    Floats sums[kRows][kParts<Floats>];
    RTX_UNROLL
    for (int row = 0; row < kRows; ++row)
      RTX_UNROLL
      for (int part = 0; part < kParts<Floats>; ++part) sums[row][part] = Floats{};
    for (int64_t key = low; key < high; ++key) {
      RTX_UNROLL
      for (int part = 0; part < kParts<Floats>; ++part) {
        const Floats some = load<Floats>(head.values + key * head.padded_width + column + part * kWidth<Floats>);
        RTX_UNROLL
        for (int row = 0; row < kRows; ++row) sums[row][part] += weights[row * stride + key] * some;
      }
    }
    float found[kRows * kLanes];
    RTX_UNROLL
    for (int row = 0; row < kRows; ++row)
      RTX_UNROLL
      for (int part = 0; part < kParts<Floats>; ++part)
        store(found + row * kLanes + part * kWidth<Floats>, sums[row][part] * factors[row]);
    const int64_t count = std::min<int64_t>(kLanes, head.width - column);
    for (int row = 0; row < kRows; ++row)
      std::copy(found + row * kLanes, found + row * kLanes + count,
                head.y + (first + row) * head.y_stride + column);
  }
}

// Scores to e^(scale * (score - the largest)) over keys low ... high - 1, 0 elsewhere in those panels; 1 / their sum.
template <class Floats>
RTX_INLINE float softmax(float* scores, int64_t low, int64_t high, float scale) {
  const int64_t begin = low / kLanes * kLanes, end = (high + kLanes - 1) / kLanes * kLanes;
  const float lowest = -std::numeric_limits<float>::infinity();
  for (int64_t key = begin; key < low; ++key) scores[key] = lowest;
  for (int64_t key = high; key < end; ++key) scores[key] = lowest;
  Floats most = Floats{} + lowest;
  for (int64_t key = begin; key < end; key += kWidth<Floats>) {
    const Floats scaled = load<Floats>(scores + key) * scale;
    store(scores + key, scaled);
    most = larger(scaled, most);
  }
  const float top = largest(most);
  Floats total = Floats{};
  for (int64_t key = begin; key < end; key += kWidth<Floats>) {
    const Floats some = exponential(load<Floats>(scores + key) - top);
    store(scores + key, some);
    total += some;
  }
  return 1.0f / sum(total);
}

template <class Floats, int kRows>
RTX_INLINE void attend_rows(const Head& head, int64_t first, float* scores, int64_t stride) {
  const AttentionShape& shape = head.shape;
  const auto low_of = [&](int64_t token) { return shape.window < 0 ? 0 : std::max<int64_t>(0, token - shape.window); };
  const auto high_of = [&](int64_t token) {
    const int64_t high = shape.causal ? token + 1 : head.length;
    return shape.window < 0 ? high : std::min(high, token + shape.window + 1);
  };
  const int64_t low = low_of(first), high = high_of(first + kRows - 1);
  dot<Floats, kRows>(head, first, low / kLanes, (high + kLanes - 1) / kLanes, scores, stride);
  float factors[kRows];
  for (int row = 0; row < kRows; ++row) {
    float* own = scores + row * stride;
    const int64_t own_low = low_of(first + row), own_high = high_of(first + row);
    factors[row] = softmax<Floats>(own, own_low, own_high, shape.scale);
    // Panels that other rows see and this one does not.
    for (int64_t key = low; key < own_low / kLanes * kLanes; ++key) own[key] = 0.0f;
    for (int64_t key = (own_high + kLanes - 1) / kLanes * kLanes; key < high; ++key) own[key] = 0.0f;
  }
  mix<Floats, kRows>(head, first, low, high, scores, stride, factors);
}

template <class Floats, int kRows>
RTX_INLINE void attend(const Head& head, float* scores, int64_t stride) {
  int64_t token = 0;
  for (; token + kRows <= head.length; token += kRows) attend_rows<Floats, kRows>(head, token, scores, stride);
  for (; token < head.length; ++token) attend_rows<Floats, 1>(head, token, scores, stride);
}

// So many rows at once that their sums fill the registers.
void attend_portable(const Head& head, float* scores, int64_t stride) { attend<Floats4, 2>(head, scores, stride); }
#if defined(__x86_64__)
RTX_AVX2 void attend_avx2(const Head& head, float* scores, int64_t stride) { attend<Floats8, 4>(head, scores, stride); }
RTX_AVX512 void attend_avx512(const Head& head, float* scores, int64_t stride) { attend<Floats16, 8>(head, scores, stride); }
#endif

}  // namespace

void packed_attention(const float* query, const float* key, const float* value, const int64_t* offsets,
                      int64_t sequences, const AttentionShape& shape, float* y, Isa isa, const Parallel& parallel) {
  const int64_t heads = shape.heads, width = shape.width;
  const int64_t padded_width = (width + kLanes - 1) / kLanes * kLanes;
  const int64_t groups = heads / shape.key_heads;
  // A task has the heads that share keys, so that these are put in order once.
  parallel(sequences * shape.key_heads, [&](int64_t task) {
    const int64_t sequence = task / shape.key_heads, key_head = task % shape.key_heads;
    const int64_t first = offsets[sequence], length = offsets[sequence + 1] - first;
    const int64_t panels = (length + kLanes - 1) / kLanes, stride = panels * kLanes;
    thread_local std::vector<float> scratch;
    const int64_t key_floats = panels * width * kLanes, value_floats = length * padded_width;
    scratch.resize(size_t(key_floats + value_floats + 8 * stride));
    float *keys = scratch.data(), *values = keys + key_floats, *scores = values + value_floats;
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t token = panel * kLanes + lane;
        float* to = keys + panel * width * kLanes + lane;
        const float* from = key + ((first + token) * shape.key_heads + key_head) * width;
        for (int64_t at = 0; at < width; ++at) to[at * kLanes] = token < length ? from[at] : 0.0f;
      }
    for (int64_t token = 0; token < length; ++token) {
      const float* from = value + ((first + token) * shape.key_heads + key_head) * width;
      float* to = values + token * padded_width;
      std::copy(from, from + width, to);
      std::fill(to + width, to + padded_width, 0.0f);
    }
    for (int64_t head = key_head * groups; head < (key_head + 1) * groups; ++head) {
      const int64_t start = (first * heads + head) * width;
      const Head one{query + start, heads * width, keys,      values,      length, width,
                     padded_width,  shape,         y + start, heads * width};
      switch (isa) {
#if defined(__x86_64__)
        case Isa::kAvx512Amx:
        case Isa::kAvx512Vnni:
          attend_avx512(one, scores, stride);
          break;
        case Isa::kAvxVnni:
        case Isa::kAvx2:
          attend_avx2(one, scores, stride);
          break;
#endif
        default:
          attend_portable(one, scores, stride);
      }
    }
  });
}

}  // namespace rtx
