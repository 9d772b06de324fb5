#include "packed_pool.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace rtx {

void packed_pool(const float* x, int64_t width, const int64_t* offsets, int64_t sequences, const int64_t* pooled,
                 Pooling pooling, float* y, const Parallel& parallel) {
  const bool one = pooling == Pooling::kCls || pooling == Pooling::kLastToken;
  const int64_t numbers = one ? sequences * width : offsets[sequences] * width;
  const int64_t parts = std::clamp<int64_t>(numbers / kWorthAThread, 1, std::max<int64_t>(sequences, 1));
  parallel(parts, [&](int64_t part) {
    for (int64_t sequence = sequences * part / parts; sequence < sequences * (part + 1) / parts; ++sequence) {
      float* to = y + sequence * width;
      const int64_t begin = offsets[sequence], end = offsets[sequence + 1];
      const auto taken = [&](int64_t token) { return pooled == nullptr || pooled[token] != 0; };
      float total = 0.0f;
      std::fill(to, to + width, pooling == Pooling::kMax ? -std::numeric_limits<float>::infinity() : 0.0f);
      for (int64_t token = begin; token < end; ++token) {
        if (!taken(token)) continue;
        const float* from = x + token * width;
        if (one) {
          total = 1.0f;
          std::copy(from, from + width, to);
          if (pooling == Pooling::kCls) break;
        } else if (pooling == Pooling::kMax) {
          total = 1.0f;
          // NaN stays what it is.
          for (int64_t at = 0; at < width; ++at) to[at] = to[at] >= from[at] || to[at] != to[at] ? to[at] : from[at];
        } else {
          const float weight = pooling == Pooling::kWeightedMean ? float(token - begin + 1) : 1.0f;
          total += weight;
          for (int64_t at = 0; at < width; ++at) to[at] += weight * from[at];
        }
      }
      if (total == 0.0f) std::fill(to, to + width, 0.0f);  // a row without a token
      if (one || pooling == Pooling::kMax) continue;
      const float divisor = std::max(pooling == Pooling::kMeanSqrtLenTokens ? std::sqrt(total) : total, 1.0f);
      for (int64_t at = 0; at < width; ++at) to[at] /= divisor;
    }
  });
}

}  // namespace rtx
