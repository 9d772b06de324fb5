#include "int8_linear.h"

#include <algorithm>

#include "simd.h"

namespace rtx {
namespace {

constexpr int kQuad = 4;
// Multiplications that take some microseconds, and into how many parts a product is divided at most.
constexpr int64_t kLeastProducts = 1 << 21, kMostParts = 8;
constexpr float kLevels = 127.0f, kZeroPoint = 128.0f, kSmallestScale = 1e-30f;

// Rows as bytes, each by its own range.
struct Tokens {
  uint8_t* values;  // [rows, padded_in], zero point 128
  float* scale;     // [rows]
  float* centre;    // [rows]
};

template <class Floats>
RTX_INLINE void quantize_row(const float* x, int64_t in, int64_t padded_in, uint8_t* to, float* scale, float* centre) {
  constexpr int kWide = kWidth<Floats>;
  const int64_t whole = in / kWide * kWide;
  float most = x[0], least = x[0], poison = 0.0f;
  if (whole > 0) {
    Floats high = load<Floats>(x), low = high, spoilt = Floats{};
    for (int64_t k = 0; k < whole; k += kWide) {
      const Floats values = load<Floats>(x + k);
      high = larger(values, high);
      low = smaller(values, low);
      spoilt += values * 0.0f;  // 0, or NaN of what is not finite
    }
    most = largest(high);
    least = -largest(-low);
    poison = sum(spoilt);
  }
  for (int64_t k = whole; k < in; ++k) {
    most = x[k] > most ? x[k] : most;
    least = x[k] < least ? x[k] : least;
    poison += x[k] * 0.0f;
  }
  const float middle = (most + least) * 0.5f;
  const float step = std::max((most - least) * (0.5f / kLevels), kSmallestScale);
  const float inverse = 1.0f / step;
  *centre = middle + poison;
  *scale = step;
  const Floats lowest = Floats{} - kLevels - 1.0f, highest = Floats{} + kLevels;
  for (int64_t k = 0; k < in; k += kWide) {
    const bool all = k < whole;
    float some[kWide] = {};
    if (!all) std::copy(x + k, x + in, some);
    const Floats values = load<Floats>(all ? x + k : some);
    // A NaN compares with nothing and may come out as any number; its row is poisoned by the centre.
    const Floats steps = smaller(larger(rounded((values - middle) * inverse), lowest), highest);
    const auto bytes = __builtin_convertvector(__builtin_convertvector(steps, Ints<Floats>) + 128,
                                               typename Vector<Floats>::Bytes);
    std::memcpy(to + k, &bytes, all ? size_t(kWide) : size_t(in - k));
  }
  for (int64_t k = in; k < padded_in; ++k) to[k] = uint8_t(kZeroPoint);  // against weights of 0
}

template <class Floats>
RTX_INLINE Floats activated(Floats x, Activation activation) {
  switch (activation) {
    case Activation::kGelu:
      return gelu(x);
    case Activation::kGeluTanh:
      return gelu_tanh(x);
    case Activation::kSilu:
      return silu(x);
    default:
      return x;
  }
}

// Where the sums of a tile go.
struct Target {
  const float* scale;   // of the tile's rows
  const float* centre;
  const PackedWeight& weight;
  int64_t column;  // of the tile's first
  Activation activation;
  float* y;  // row of the tile's first
};

template <class Floats>
RTX_INLINE void finish_tile(const int32_t* sums, int rows, int panels, const Target& target) {
  const PackedWeight& weight = target.weight;
  for (int row = 0; row < rows; ++row, sums += panels * kLanes) {
    float* y = target.y + row * weight.out;
    for (int at = 0; at < panels * kLanes; at += kWidth<Floats>) {
      const int64_t column = target.column + at;
      Ints<Floats> product;
      std::memcpy(&product, sums + at, sizeof product);
      const Floats linear = __builtin_convertvector(product, Floats) * load<Floats>(weight.scale.data() + column) *
                                target.scale[row] +
                            load<Floats>(weight.column_sum.data() + column) * target.centre[row] +
                            load<Floats>(weight.bias.data() + column);
      const Floats found = activated(linear, target.activation);
      const int64_t left = weight.out - column;
      if (left >= kWidth<Floats>)
        store(y + column, found);
      else if (left > 0)
        std::memcpy(y + column, &found, sizeof(float) * size_t(left));
    }
  }
}

#define RTX_FINISH_ARGUMENTS const int32_t *sums, int rows, int panels, const Target &target
#define RTX_FINISH_VALUES sums, rows, panels, target

// What a tile is multiplied from: rows of bytes, and panels of columns that follow each other.
struct Factors {
  const uint8_t* rows;    // of the tile's first row
  const int8_t* columns;  // of its first panel
  const int32_t* offset;  // of its first column
  int64_t padded_in;      // bytes from row to row; 16 times as many from panel to panel
};

// A kernel multiplies a tile of up to kRows rows and kPanels panels into sums, [rows][panels][16], which `finish` makes
// numbers of. Apart, as with all that follows inlined the sums would not stay in registers while they grow.

struct Portable {
  template <int kTileRows, int kTilePanels>
  static void multiply(const Factors& factors, int32_t* sums) {
    for (int row = 0; row < kTileRows; ++row) {
      const uint8_t* bytes = factors.rows + row * factors.padded_in;
      for (int panel = 0; panel < kTilePanels; ++panel, sums += kLanes) {
        const int8_t* columns = factors.columns + panel * factors.padded_in * kLanes;
        std::memset(sums, 0, sizeof(int32_t) * kLanes);
        for (int64_t k = 0; k < factors.padded_in; k += kQuad, columns += kLanes * kQuad)
          for (int lane = 0; lane < kLanes; ++lane)
            for (int at = 0; at < kQuad; ++at)
              sums[lane] += (int32_t(bytes[k + at]) - 128) * int32_t(columns[lane * kQuad + at]);
      }
    }
  }
  static void quantize(const float* x, int64_t in, int64_t padded_in, uint8_t* to, float* scale, float* centre) {
    quantize_row<Floats4>(x, in, padded_in, to, scale, centre);
  }
  static void finish(RTX_FINISH_ARGUMENTS) { finish_tile<Floats4>(RTX_FINISH_VALUES); }
  static constexpr int kRows = 1, kPanels = 1;
};

#if defined(__x86_64__)

RTX_INLINE int32_t quad_at(const uint8_t* bytes) {
  int32_t found;
  std::memcpy(&found, bytes, sizeof found);
  return found;
}

struct Avx2 {
  // u8 by s8 is summed in pairs with saturation at 16 bits. The magnitude of a token's byte, at most 128, by a weight
  // that takes its sign, at most 127: a pair is at most 32,512, which fits.
  template <int kTileRows, int kTilePanels>
  RTX_AVX2 RTX_APART static void multiply(const Factors& factors, int32_t* to) {
    constexpr int kHalves = 2 * kTilePanels;
    const int64_t padded_in = factors.padded_in;
    __m256i sums[kTileRows][kHalves];
    RTX_UNROLL
    for (int row = 0; row < kTileRows; ++row)
      RTX_UNROLL
      for (int half = 0; half < kHalves; ++half) sums[row][half] = _mm256_setzero_si256();
    const __m256i ones = _mm256_set1_epi16(1), flip = _mm256_set1_epi8(int8_t(0x80));
    for (int64_t k = 0; k < padded_in; k += kQuad) {
      __m256i columns[kHalves];
      RTX_UNROLL
      for (int half = 0; half < kHalves; ++half)
        columns[half] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(
            factors.columns + (half / 2 * padded_in + k) * kLanes + 32 * (half % 2)));
      RTX_UNROLL
      for (int row = 0; row < kTileRows; ++row) {
        const __m256i steps = _mm256_xor_si256(_mm256_set1_epi32(quad_at(factors.rows + row * padded_in + k)), flip);
        const __m256i sizes = _mm256_abs_epi8(steps);
        RTX_UNROLL
        for (int half = 0; half < kHalves; ++half) {
          const __m256i pairs = _mm256_maddubs_epi16(sizes, _mm256_sign_epi8(columns[half], steps));
          sums[row][half] = _mm256_add_epi32(sums[row][half], _mm256_madd_epi16(pairs, ones));
        }
      }
    }
    RTX_UNROLL
    for (int row = 0; row < kTileRows; ++row)
      RTX_UNROLL
      for (int half = 0; half < kHalves; ++half)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (row * kHalves + half) * 8), sums[row][half]);
  }
  RTX_AVX2 static void quantize(const float* x, int64_t in, int64_t padded_in, uint8_t* to, float* scale,
                                float* centre) {
    quantize_row<Floats8>(x, in, padded_in, to, scale, centre);
  }
  RTX_AVX2 static void finish(RTX_FINISH_ARGUMENTS) { finish_tile<Floats8>(RTX_FINISH_VALUES); }
  static constexpr int kRows = 4, kPanels = 1;
};

struct AvxVnni {
  template <int kTileRows, int kTilePanels>
  RTX_AVXVNNI RTX_APART static void multiply(const Factors& factors, int32_t* to) {
    constexpr int kHalves = 2 * kTilePanels;
    const int64_t padded_in = factors.padded_in;
    __m256i sums[kTileRows][kHalves];
    RTX_UNROLL
    for (int row = 0; row < kTileRows; ++row)
      RTX_UNROLL
      for (int half = 0; half < kHalves; ++half)
        // Bytes count from 0, steps from 128.
        sums[row][half] =
            _mm256_sub_epi32(_mm256_setzero_si256(),
                             _mm256_loadu_si256(reinterpret_cast<const __m256i*>(factors.offset + 8 * half)));
    for (int64_t k = 0; k < padded_in; k += kQuad) {
      __m256i columns[kHalves];
      RTX_UNROLL
      for (int half = 0; half < kHalves; ++half)
        columns[half] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(
            factors.columns + (half / 2 * padded_in + k) * kLanes + 32 * (half % 2)));
      RTX_UNROLL
      for (int row = 0; row < kTileRows; ++row) {
        const __m256i steps = _mm256_set1_epi32(quad_at(factors.rows + row * padded_in + k));
        RTX_UNROLL
        for (int half = 0; half < kHalves; ++half)
          sums[row][half] = _mm256_dpbusd_avx_epi32(sums[row][half], steps, columns[half]);
      }
    }
    RTX_UNROLL
    for (int row = 0; row < kTileRows; ++row)
      RTX_UNROLL
      for (int half = 0; half < kHalves; ++half)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (row * kHalves + half) * 8), sums[row][half]);
  }
  RTX_AVXVNNI static void quantize(const float* x, int64_t in, int64_t padded_in, uint8_t* to, float* scale,
                                   float* centre) {
    quantize_row<Floats8>(x, in, padded_in, to, scale, centre);
  }
  RTX_AVXVNNI static void finish(RTX_FINISH_ARGUMENTS) { finish_tile<Floats8>(RTX_FINISH_VALUES); }
  static constexpr int kRows = 6, kPanels = 1;
};

struct Avx512Vnni {
  template <int kTileRows, int kTilePanels>
  RTX_AVX512 RTX_APART static void multiply(const Factors& factors, int32_t* to) {
    const int64_t padded_in = factors.padded_in;
    __m512i sums[kTileRows][kTilePanels];
    RTX_UNROLL
    for (int row = 0; row < kTileRows; ++row)
      RTX_UNROLL
      for (int panel = 0; panel < kTilePanels; ++panel)
        // Bytes count from 0, steps from 128.
        sums[row][panel] =
            _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(factors.offset + panel * kLanes));
    for (int64_t k = 0; k < padded_in; k += kQuad) {
      __m512i columns[kTilePanels];
      RTX_UNROLL
      for (int panel = 0; panel < kTilePanels; ++panel)
        columns[panel] = _mm512_loadu_si512(factors.columns + (panel * padded_in + k) * kLanes);
      RTX_UNROLL
      for (int row = 0; row < kTileRows; ++row) {
        const __m512i steps = _mm512_set1_epi32(quad_at(factors.rows + row * padded_in + k));
        RTX_UNROLL
        for (int panel = 0; panel < kTilePanels; ++panel)
          sums[row][panel] = _mm512_dpbusd_epi32(sums[row][panel], steps, columns[panel]);
      }
    }
    RTX_UNROLL
    for (int row = 0; row < kTileRows; ++row)
      RTX_UNROLL
      for (int panel = 0; panel < kTilePanels; ++panel)
        _mm512_storeu_si512(to + (row * kTilePanels + panel) * kLanes, sums[row][panel]);
  }
  RTX_AVX512 static void quantize(const float* x, int64_t in, int64_t padded_in, uint8_t* to, float* scale,
                                  float* centre) {
    quantize_row<Floats16>(x, in, padded_in, to, scale, centre);
  }
  RTX_AVX512 static void finish(RTX_FINISH_ARGUMENTS) { finish_tile<Floats16>(RTX_FINISH_VALUES); }
  static constexpr int kRows = 6, kPanels = 4;
};

#endif  // __x86_64__

// Calls the function for the tile's size: there is one for each number of rows and panels up to the largest.
template <class Kernel, int kRows, int kPanels>
void multiply(int rows, int panels, const Factors& factors, int32_t* sums) {
  if (rows == kRows && panels == kPanels) return Kernel::template multiply<kRows, kPanels>(factors, sums);
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply<Kernel, kRows - 1, kPanels>(rows, panels, factors, sums);
  }
  if constexpr (kPanels > 1) return multiply<Kernel, kRows, kPanels - 1>(rows, panels, factors, sums);
}

template <class Kernel>
void run(const float* x, const PackedWeight& weight, Activation activation, int64_t tokens, float* y,
         const Parallel& parallel) {
  // A block of rows is quantised and multiplied by one thread, so that it is read from that core's cache.
  constexpr int64_t kBlockRows = 48;
  const int64_t all_panels = weight.padded_out / kLanes;
  // With few rows, columns are divided too, where each part is worth the waking of a thread. A part quantises its rows
  // itself, which is little beside the rest.
  const int64_t blocks = (tokens + kBlockRows - 1) / kBlockRows;
  const int64_t groups = (all_panels + Kernel::kPanels - 1) / Kernel::kPanels;
  const int64_t worth = tokens * weight.padded_in * weight.padded_out / kLeastProducts;
  const int64_t parts = std::clamp<int64_t>(std::min<int64_t>(worth, kMostParts) / blocks, 1, groups);
  parallel(blocks * parts, [&](int64_t at) {
    const int64_t block = at / parts, part = at % parts;
    const int64_t first = block * kBlockRows, rows = std::min(kBlockRows, tokens - first);
    thread_local std::vector<uint8_t> bytes;
    thread_local std::vector<float> numbers;
    bytes.resize(size_t(rows * weight.padded_in));
    numbers.resize(size_t(2 * rows));
    const Tokens quantized{bytes.data(), numbers.data(), numbers.data() + rows};
    for (int64_t row = 0; row < rows; ++row)
      Kernel::quantize(x + (first + row) * weight.in, weight.in, weight.padded_in,
                       quantized.values + row * weight.padded_in, quantized.scale + row, quantized.centre + row);
    const int64_t begin = groups * part / parts * Kernel::kPanels;
    const int64_t end = std::min(all_panels, groups * (part + 1) / parts * Kernel::kPanels);
    for (int64_t panel = begin; panel < end; panel += Kernel::kPanels) {
      const int panels = int(std::min<int64_t>(Kernel::kPanels, end - panel));
      const int64_t column = panel * kLanes;
      for (int64_t row = 0; row < rows; row += Kernel::kRows) {
        const int some = int(std::min<int64_t>(Kernel::kRows, rows - row));
        alignas(64) int32_t sums[Kernel::kRows * Kernel::kPanels * kLanes];
        const Factors factors{quantized.values + row * weight.padded_in, weight.values.data() + column * weight.padded_in,
                              weight.offset.data() + column, weight.padded_in};
        multiply<Kernel, Kernel::kRows, Kernel::kPanels>(some, panels, factors, sums);
        Kernel::finish(sums, some, panels,
                       {quantized.scale + row, quantized.centre + row, weight, column, activation,
                        y + (first + row) * weight.out});
      }
    }
  });
}

}  // namespace

PackedWeight::PackedWeight(const uint8_t* from, const float* scales, const float* sums, const float* biases,
                           int64_t rows, int64_t columns)
    : in(rows), out(columns), padded_in((rows + kQuad - 1) / kQuad * kQuad),
      padded_out((columns + kLanes - 1) / kLanes * kLanes) {
  values.assign(size_t(padded_in * padded_out), 0);
  offset.assign(size_t(padded_out), 0);
  for (int64_t k = 0; k < in; ++k)
    for (int64_t n = 0; n < out; ++n) {
      const int32_t value = int32_t(from[k * out + n]) - 128;
      values[size_t(((n / kLanes * (padded_in / kQuad) + k / kQuad) * kLanes + n % kLanes) * kQuad + k % kQuad)] =
          int8_t(value);
      offset[size_t(n)] += 128 * value;
    }
  scale.assign(size_t(padded_out), 0.0f);
  column_sum = bias = scale;
  std::copy(scales, scales + out, scale.begin());
  std::copy(sums, sums + out, column_sum.begin());
  if (biases != nullptr) std::copy(biases, biases + out, bias.begin());
}

void int8_linear(const float* x, const PackedWeight& weight, Activation activation, int64_t tokens, float* y, Isa isa,
                 const Parallel& parallel) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx512Vnni:
      return run<Avx512Vnni>(x, weight, activation, tokens, y, parallel);
    case Isa::kAvxVnni:
      return run<AvxVnni>(x, weight, activation, tokens, y, parallel);
    case Isa::kAvx2:
      return run<Avx2>(x, weight, activation, tokens, y, parallel);
#endif
    default:
      return run<Portable>(x, weight, activation, tokens, y, parallel);
  }
}

}  // namespace rtx
