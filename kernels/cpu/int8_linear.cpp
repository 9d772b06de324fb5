#include "int8_linear.h"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <thread>
#include <type_traits>
#include <utility>

#include "simd.h"
#include "tiles.h"

namespace rtx {
namespace {

// Rows of a column that lie together, and to a multiple of which all are filled up with 0.
constexpr int kQuad = 4, kDepth = 64;
constexpr int64_t kLine = 64;  // bytes of a cache
// Multiplications that take some microseconds, and into how many parts a product is divided at most.
constexpr int64_t kLeastProducts = 1 << 21, kMostParts = 8;
constexpr float kLevels = 127.0f, kSmallestScale = 1e-30f;

// Rows in whole steps, each by its own range.
struct Tokens {
  uint8_t* values;    // [rows, padded_in] of what the kernel takes: bytes with zero point 128, or 16 bits
  int64_t row_bytes;  // from row to row
  float* scale;       // [rows]
  float* centre;      // [rows]
};

// Step: uint8_t with zero point 128, or int16_t.
template <class Step>
constexpr int32_t kZero = std::is_same_v<Step, uint8_t> ? 128 : 0;

// The lowest bits of each. What GCC makes of a conversion to bytes takes them one by one.
template <class Step, class Ints>
RTX_INLINE void store_low(Ints values, Step* to) {
  constexpr int kCount = sizeof(Ints) / sizeof(int32_t);
  typedef int16_t Shorts __attribute__((vector_size(kCount * sizeof(int16_t))));
  typedef Step Steps __attribute__((vector_size(kCount * sizeof(Step))));
#if defined(__x86_64__)
  if constexpr (sizeof(Step) == 1 && kCount == 16) {
    __asm__("vpmovdb %1, %0" : "=m"(*reinterpret_cast<Steps*>(to)) : "v"(values));
    return;
  }
#endif
  const Steps found = __builtin_convertvector(__builtin_convertvector(values, Shorts), Steps);
  std::memcpy(to, &found, sizeof found);
}

// A NaN compares with nothing and may come out as any number; its row is poisoned by the centre.
template <class Floats, class Step>
RTX_INLINE void store_steps(Floats values, float middle, float inverse, Step* to) {
  // 1.5 * 2^23, behind which no fraction fits, and the zero point: the lowest bits are the whole number.
  const float shift = 12582912.0f + kZero<Step>;
  const Floats lowest = Floats{} + (shift - kLevels - 1.0f), highest = Floats{} + (shift + kLevels);
  const Floats shifted = smaller(larger((values - middle) * inverse + shift, lowest), highest);
  store_low((Ints<Floats>)shifted, to);
}

template <class Floats, class Step>
RTX_INLINE void quantize_row(const float* x, int64_t in, int64_t padded_in, uint8_t* bytes, float* scale,
                             float* centre) {
  constexpr int kWide = kWidth<Floats>;
  Step* const to = reinterpret_cast<Step*>(bytes);
  const int64_t whole = in / kWide * kWide;
  float most = x[0], least = x[0], poison = 0.0f;
  if (whole > 0) {
    // Two at a time: each waits for the last of its own kind.
    Floats high[2], low[2], spoilt[2] = {};
    high[0] = high[1] = low[0] = low[1] = load<Floats>(x);
    const auto take = [&](int64_t k, int which) __attribute__((always_inline)) {
      const Floats values = load<Floats>(x + k);
      high[which] = larger(values, high[which]);
      low[which] = smaller(values, low[which]);
      spoilt[which] += values * 0.0f;  // 0, or NaN of what is not finite
    };
    int64_t k = 0;
    for (; k + 2 * kWide <= whole; k += 2 * kWide) {
      take(k, 0);
      take(k + kWide, 1);
    }
    if (k < whole) take(k, 0);
    most = largest(larger(high[0], high[1]));
    least = -largest(-smaller(low[0], low[1]));
    poison = sum(spoilt[0] + spoilt[1]);
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
  int64_t k = 0;
  for (; k < whole; k += kWide) store_steps(load<Floats>(x + k), middle, inverse, to + k);
  if (k < in) {
    Step found[kWide];
    store_steps(load_some<Floats>(x + k, in - k), middle, inverse, found);
    for (; k < in; ++k) to[k] = found[k - whole];
  }
  for (; k < padded_in; ++k) to[k] = Step(kZero<Step>);  // against weights of 0
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
  const float* scale;  // of the tile's rows
  const float* centre;
  const PackedWeight& weight;
  const Around& around;
  int64_t panel, row;     // the tile's first
  const float* residual;  // of the first token, or null
  float* const* y;
};

// 16 columns or fewer of a tile, or the part of them that a vector holds.
struct Strip {
  const int32_t* sums;  // of the first row
  int64_t sums_stride;
  const float* scale;  // of rows
  const float* centre;
  const float* residual;  // of the first row
  float* y;
  int64_t stride;  // of y and residual
  int64_t columns;
};

enum class Combine { kNone, kAdd, kMultiply };

template <class Floats, Activation kActivation, Combine kCombine, bool kWhole>
RTX_INLINE void finish_strip(const Strip& strip, int rows, Floats scale, Floats column_sum, Floats bias) {
  for (int row = 0; row < rows; ++row) {
    Ints<Floats> product;
    std::memcpy(&product, strip.sums + row * strip.sums_stride, sizeof product);
    float* const y = strip.y + row * strip.stride;
    Floats found = activated(
        __builtin_convertvector(product, Floats) * scale * strip.scale[row] + column_sum * strip.centre[row] + bias,
        kActivation);
    if (kCombine != Combine::kNone) {
      const float* from = kCombine == Combine::kAdd ? strip.residual + row * strip.stride : y;
      const Floats other = kWhole ? load<Floats>(from) : load_some<Floats>(from, strip.columns);
      found = kCombine == Combine::kAdd ? found + other : found * other;
    }
    if (kWhole)
      store(y, found);
    else
      store_some(y, found, strip.columns);
  }
}

// The loops differ in what they do, so that none of them decides anything.
template <class Floats, Activation kActivation, Combine kCombine>
RTX_INLINE void finish_columns(const Strip& strip, int rows, Floats scale, Floats column_sum, Floats bias) {
  if (strip.columns >= kWidth<Floats>)
    finish_strip<Floats, kActivation, kCombine, true>(strip, rows, scale, column_sum, bias);
  else
    finish_strip<Floats, kActivation, kCombine, false>(strip, rows, scale, column_sum, bias);
}

template <class Floats, Activation kActivation>
RTX_INLINE void finish_panels(const int32_t* sums, int rows, int panels, const Target& target) {
  const PackedWeight& weight = target.weight;
  for (int at = 0; at < panels * kLanes; at += kWidth<Floats>) {
    const int64_t place = target.panel * kLanes + at;
    const PackedWeight::Panel& panel = weight.panels[size_t(place / kLanes)];
    const int64_t stride = weight.parts[size_t(panel.part)], column = panel.column + place % kLanes;
    if (column >= stride) continue;
    const int64_t first = target.row * stride + column;
    const Strip strip{sums + at,
                      panels * kLanes,
                      target.scale,
                      target.centre,
                      target.residual == nullptr ? nullptr : target.residual + first,
                      target.y[target.around.gated ? 0 : panel.part] + first,
                      stride,
                      stride - column};
    const Floats scale = load<Floats>(weight.scale.data() + place);
    const Floats column_sum = load<Floats>(weight.column_sum.data() + place);
    const Floats bias = load<Floats>(weight.bias.data() + place);
    if (target.around.gated && panel.part == 1)
      finish_columns<Floats, Activation::kNone, Combine::kMultiply>(strip, rows, scale, column_sum, bias);
    else if (target.residual != nullptr)
      finish_columns<Floats, kActivation, Combine::kAdd>(strip, rows, scale, column_sum, bias);
    else
      finish_columns<Floats, kActivation, Combine::kNone>(strip, rows, scale, column_sum, bias);
  }
}

template <class Floats>
RTX_INLINE void finish_tile(const int32_t* sums, int rows, int panels, const Target& target) {
  switch (target.around.activation) {
    case Activation::kGelu:
      return finish_panels<Floats, Activation::kGelu>(sums, rows, panels, target);
    case Activation::kGeluTanh:
      return finish_panels<Floats, Activation::kGeluTanh>(sums, rows, panels, target);
    case Activation::kSilu:
      return finish_panels<Floats, Activation::kSilu>(sums, rows, panels, target);
    default:
      return finish_panels<Floats, Activation::kNone>(sums, rows, panels, target);
  }
}

#define RTX_FINISH_ARGUMENTS const int32_t *sums, int rows, int panels, const Target &target
#define RTX_FINISH_VALUES sums, rows, panels, target
#define RTX_ROW_ARGUMENTS const float *x, int64_t width, const Norm &norm, float *y
#define RTX_ROW_VALUES x, width, norm, y

// What a tile is multiplied from: rows of bytes, and panels of columns that follow each other.
struct Factors {
  const uint8_t* rows;    // of the tile's first row, as the kernel takes them
  const int8_t* columns;  // of its first panel
  const int32_t* start;   // of its first column
  int64_t in;             // a multiple of 4
  int64_t padded_in;      // a 16th of the bytes from panel to panel
  int64_t row_bytes;      // from row to row
};

// Calls the function for the tile's size: there is one for each number of rows and panels up to the largest.
template <class Kernel, int kRows, int kPanels>
void by_size(int rows, int panels, const Factors& factors, int32_t* sums) {
  if (rows == kRows && panels == kPanels) return Kernel::template tile<kRows, kPanels>(factors, sums);
  if constexpr (kRows > 1) {
    if (rows < kRows) return by_size<Kernel, kRows - 1, kPanels>(rows, panels, factors, sums);
  }
  if constexpr (kPanels > 1) return by_size<Kernel, kRows, kPanels - 1>(rows, panels, factors, sums);
}

// A kernel multiplies a tile of up to kRows rows and kPanels panels into sums, [rows][panels][16], which `finish` makes
// numbers of. Apart, as with all that follows inlined the sums would not stay in registers while they grow. Around its
// tiles a thread has `Registers`. Behind the last row there are as many as make up a multiple of 16, of
// anything.

template <int kMostPanels>
struct Plain {
  struct Registers {};
  static constexpr int kPanels = kMostPanels;
};

struct Portable : Plain<1> {
  static void multiply(int rows, int panels, const Factors& factors, int32_t* sums) {
    for (int row = 0; row < rows; ++row) {
      const uint8_t* bytes = factors.rows + row * factors.row_bytes;
      for (int panel = 0; panel < panels; ++panel, sums += kLanes) {
        const int8_t* columns = factors.columns + panel * factors.padded_in * kLanes;
        std::memset(sums, 0, sizeof(int32_t) * kLanes);
        for (int64_t k = 0; k < factors.in; k += kQuad, columns += kLanes * kQuad)
          for (int lane = 0; lane < kLanes; ++lane)
            for (int at = 0; at < kQuad; ++at)
              sums[lane] += (int32_t(bytes[k + at]) - 128) * int32_t(columns[lane * kQuad + at]);
      }
    }
  }
  static void quantize(const float* x, int64_t in, int64_t padded_in, uint8_t* to, float* scale, float* centre) {
    quantize_row<Floats4, uint8_t>(x, in, padded_in, to, scale, centre);
  }
  static void finish(RTX_FINISH_ARGUMENTS) { finish_tile<Floats4>(RTX_FINISH_VALUES); }
  static void normalize(RTX_ROW_ARGUMENTS) { normalize_row<Floats4>(RTX_ROW_VALUES); }
  static constexpr int kRows = 1, kStepBytes = 1;
};

#if defined(__x86_64__)

RTX_INLINE int32_t quad_at(const uint8_t* bytes) {
  int32_t found;
  std::memcpy(&found, bytes, sizeof found);
  return found;
}

// Without VNNI: u8 by s8 in 16 bits would saturate (vpmaddubsw). Steps of 16 bits by weights that are widened on the
// way are exact, take no more instructions than what keeps the first from saturating, and fewer where shuffles are
// dear.
struct Avx2 : Plain<1> {
  static void multiply(int rows, int panels, const Factors& factors, int32_t* sums) {
    by_size<Avx2, kRows, kPanels>(rows, panels, factors, sums);
  }
  template <int kTileRows, int kTilePanels>
  RTX_AVX2 RTX_APART static void tile(const Factors& factors, int32_t* to) {
    const int64_t stride = factors.row_bytes;
    // A quarter is four columns of a panel. Two at a time, each with two sums a column.
    for (int quarter = 0; quarter < 4 * kTilePanels; quarter += 2) {
      const int8_t* columns = factors.columns + quarter / 4 * factors.padded_in * kLanes + quarter % 4 * 16;
      __m256i sums[kTileRows][2];
      RTX_FOR (row, kTileRows) sums[row][0] = sums[row][1] = _mm256_setzero_si256();
      for (int64_t k = 0; k < factors.in; k += kQuad) {
        const int8_t* from = columns + k * kLanes;
        const __m256i some = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        const __m256i more = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16)));
        RTX_FOR (row, kTileRows) {
          int64_t quad;
          std::memcpy(&quad, factors.rows + row * stride + k * 2, sizeof quad);
          const __m256i steps = _mm256_set1_epi64x(quad);
          sums[row][0] = _mm256_add_epi32(sums[row][0], _mm256_madd_epi16(steps, some));
          sums[row][1] = _mm256_add_epi32(sums[row][1], _mm256_madd_epi16(steps, more));
        }
      }
      RTX_FOR (row, kTileRows) {
        // Columns 0 1 4 5, 2 3 6 7.
        const __m256i both = _mm256_hadd_epi32(sums[row][0], sums[row][1]);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + row * kTilePanels * kLanes + quarter * 4),
                            _mm256_permute4x64_epi64(both, 0xd8));
      }
    }
  }
  RTX_AVX2 static void quantize(const float* x, int64_t in, int64_t padded_in, uint8_t* to, float* scale,
                                float* centre) {
    quantize_row<Floats8, int16_t>(x, in, padded_in, to, scale, centre);
  }
  RTX_AVX2 static void finish(RTX_FINISH_ARGUMENTS) { finish_tile<Floats8>(RTX_FINISH_VALUES); }
  RTX_AVX2 static void normalize(RTX_ROW_ARGUMENTS) { normalize_row<Floats8>(RTX_ROW_VALUES); }
  static constexpr int kRows = 6, kStepBytes = 2;
};

struct AvxVnni : Plain<1> {
  static void multiply(int rows, int panels, const Factors& factors, int32_t* sums) {
    by_size<AvxVnni, kRows, kPanels>(rows, panels, factors, sums);
  }
  template <int kTileRows, int kTilePanels>
  RTX_AVXVNNI RTX_APART static void tile(const Factors& factors, int32_t* to) {
    constexpr int kHalves = 2 * kTilePanels;
    const int64_t padded_in = factors.padded_in;
    __m256i sums[kTileRows][kHalves];
    RTX_FOR (row, kTileRows)
      RTX_FOR (half, kHalves)
        // Bytes count from 0, steps from 128.
        sums[row][half] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(factors.start + 8 * half));
    for (int64_t k = 0; k < factors.in; k += kQuad) {
      __m256i columns[kHalves];
      RTX_FOR (half, kHalves)
        columns[half] = _mm256_loadu_si256(
            reinterpret_cast<const __m256i*>(factors.columns + (half / 2 * padded_in + k) * kLanes + 32 * (half % 2)));
      RTX_FOR (row, kTileRows) {
        const __m256i steps = _mm256_set1_epi32(quad_at(factors.rows + row * factors.row_bytes + k));
        RTX_FOR (half, kHalves) sums[row][half] = _mm256_dpbusd_avx_epi32(sums[row][half], steps, columns[half]);
      }
    }
    RTX_FOR (row, kTileRows)
      RTX_FOR (half, kHalves)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (row * kHalves + half) * 8), sums[row][half]);
  }
  RTX_AVXVNNI static void quantize(const float* x, int64_t in, int64_t padded_in, uint8_t* to, float* scale,
                                   float* centre) {
    quantize_row<Floats8, uint8_t>(x, in, padded_in, to, scale, centre);
  }
  RTX_AVXVNNI static void finish(RTX_FINISH_ARGUMENTS) { finish_tile<Floats8>(RTX_FINISH_VALUES); }
  RTX_AVXVNNI static void normalize(RTX_ROW_ARGUMENTS) { normalize_row<Floats8>(RTX_ROW_VALUES); }
  static constexpr int kRows = 6, kStepBytes = 1;
};

struct Avx512Vnni : Plain<4> {
  static void multiply(int rows, int panels, const Factors& factors, int32_t* sums) {
    by_size<Avx512Vnni, kRows, kPanels>(rows, panels, factors, sums);
  }
  template <int kTileRows, int kTilePanels>
  RTX_AVX512 RTX_APART static void tile(const Factors& factors, int32_t* to) {
    const int64_t padded_in = factors.padded_in;
    __m512i sums[kTileRows][kTilePanels];
    RTX_FOR (row, kTileRows)
      RTX_FOR (panel, kTilePanels)
        // Bytes count from 0, steps from 128.
        sums[row][panel] = _mm512_loadu_si512(factors.start + panel * kLanes);
    for (int64_t k = 0; k < factors.in; k += kQuad) {
      __m512i columns[kTilePanels];
      RTX_FOR (panel, kTilePanels)
        columns[panel] = _mm512_loadu_si512(factors.columns + (panel * padded_in + k) * kLanes);
      RTX_FOR (row, kTileRows) {
        const __m512i steps = _mm512_set1_epi32(quad_at(factors.rows + row * factors.row_bytes + k));
        RTX_FOR (panel, kTilePanels) sums[row][panel] = _mm512_dpbusd_epi32(sums[row][panel], steps, columns[panel]);
      }
    }
    RTX_FOR (row, kTileRows)
      RTX_FOR (panel, kTilePanels) _mm512_storeu_si512(to + (row * kTilePanels + panel) * kLanes, sums[row][panel]);
  }
  RTX_AVX512 static void quantize(const float* x, int64_t in, int64_t padded_in, uint8_t* to, float* scale,
                                  float* centre) {
    quantize_row<Floats16, uint8_t>(x, in, padded_in, to, scale, centre);
  }
  RTX_AVX512 static void finish(RTX_FINISH_ARGUMENTS) { finish_tile<Floats16>(RTX_FINISH_VALUES); }
  RTX_AVX512 static void normalize(RTX_ROW_ARGUMENTS) { normalize_row<Floats16>(RTX_ROW_VALUES); }
  static constexpr int kRows = 6, kStepBytes = 1;
};

#if defined(RTX_HAS_AMX)

// Products of 16 rows by 16 columns, 64 deep, in registers of their own.
struct Amx {
  using Registers = Tiles;

  static void multiply(int rows, int panels, const Factors& factors, int32_t* sums) {
    if (rows > 16)
      panels > 1 ? tile<true, 2>(factors, sums) : tile<true, 1>(factors, sums);
    else
      panels > 1 ? tile<false, 2>(factors, sums) : tile<false, 1>(factors, sums);
  }

  // 16 rows, or 32, and one panel or two. Registers 0 to 3 are sums, which begin with the same numbers in each row, as
  // bytes count from 0 and steps from 128.
  template <bool kTall, int kTilePanels>
  RTX_AMX RTX_APART static void tile(const Factors& factors, int32_t* to) {
    constexpr int64_t kStride = kTilePanels * kLanes;
    const uint8_t *above = factors.rows, *below = above + 16 * factors.row_bytes;
    const int8_t *left = factors.columns, *right = left + kLanes * factors.padded_in;
    settle();
    _tile_loadd(0, factors.start, 0);
    if (kTilePanels > 1) _tile_loadd(1, factors.start + kLanes, 0);
    if (kTall) _tile_loadd(2, factors.start, 0);
    if (kTall && kTilePanels > 1) _tile_loadd(3, factors.start + kLanes, 0);
    for (int64_t k = 0; k < factors.in; k += 64) {
      _tile_loadd(4, above + k, factors.row_bytes);
      _tile_loadd(6, left + k * kLanes, 64);
      _tile_dpbusd(0, 4, 6);
      if (kTall) {
        _tile_loadd(5, below + k, factors.row_bytes);
        _tile_dpbusd(2, 5, 6);
      }
      if (kTilePanels > 1) {
        _tile_loadd(7, right + k * kLanes, 64);
        _tile_dpbusd(1, 4, 7);
        if (kTall) _tile_dpbusd(3, 5, 7);
      }
    }
    _tile_stored(0, to, kStride * sizeof(int32_t));
    if (kTilePanels > 1) _tile_stored(1, to + kLanes, kStride * sizeof(int32_t));
    if (kTall) _tile_stored(2, to + 16 * kStride, kStride * sizeof(int32_t));
    if (kTall && kTilePanels > 1) _tile_stored(3, to + 16 * kStride + kLanes, kStride * sizeof(int32_t));
  }

  static void quantize(const float* x, int64_t in, int64_t padded_in, uint8_t* to, float* scale, float* centre) {
    Avx512Vnni::quantize(x, in, padded_in, to, scale, centre);
  }
  static void finish(RTX_FINISH_ARGUMENTS) { Avx512Vnni::finish(RTX_FINISH_VALUES); }
  static void normalize(RTX_ROW_ARGUMENTS) { Avx512Vnni::normalize(RTX_ROW_VALUES); }
  static constexpr int kRows = 32, kPanels = 2, kStepBytes = 1;
};

#endif  // RTX_HAS_AMX
#endif  // __x86_64__

template <class Kernel>
class Run {
 public:
  Run(const float* x, const PackedWeight& weight, const Around& around, const float* residual, int64_t tokens,
      float* const* y)
      : x_(x),
        weight_(weight),
        around_(around),
        residual_(residual),
        tokens_(tokens),
        y_(y),
        halves_(around.gated ? 2 : 1),
        panels_(int64_t(weight.panels.size()) / halves_) {}

  void operator()(const Parallel& parallel) {
    if (tokens_ == 0) return;
    // With few rows, columns are divided too, where each part is worth the waking of a thread. A part quantises its
    // rows itself, which is little beside the rest.
    const int64_t blocks = (tokens_ + kBlockRows - 1) / kBlockRows;
    const int64_t groups = (panels_ + Kernel::kPanels - 1) / Kernel::kPanels;
    const int64_t worth = tokens_ * weight_.in * int64_t(weight_.panels.size()) * kLanes / kLeastProducts;
    static const int64_t threads = std::max<int64_t>(1, std::thread::hardware_concurrency());
    const int64_t parts = std::clamp<int64_t>(std::min({worth, threads, kMostParts}) / blocks, 1, groups);
    std::atomic<int64_t> left[kMostParts];  // of each block, where there are parts
    if (parts > 1)
      for (int64_t block = 0; block < blocks; ++block) left[block] = parts;
    parallel(blocks * parts, [&](int64_t at) {
      const int64_t block = at / parts, part = at % parts;
      const int64_t first = block * kBlockRows, rows = std::min(kBlockRows, tokens_ - first);
      multiply(first, rows, groups * part / parts * Kernel::kPanels,
               std::min(panels_, groups * (part + 1) / parts * Kernel::kPanels));
      // A norm needs a whole row: who comes last has it.
      if (around_.norm_of_output && around_.norm.kind != NormKind::kNone &&
          (parts == 1 || left[block].fetch_sub(1, std::memory_order_acq_rel) == 1))
        for (int64_t row = first; row < first + rows; ++row) {
          float* y = y_[0] + row * weight_.parts[0];
          Kernel::normalize(y, weight_.parts[0], around_.norm, y);
        }
    });
  }

 private:
  // A block of rows is quantised and multiplied by one thread, so that it is read from that core's cache.
  static constexpr int64_t kBlockRows = 64;

  void multiply(int64_t first, int64_t rows, int64_t begin, int64_t end) {
    thread_local std::vector<uint8_t> bytes;
    thread_local std::vector<float> numbers;
    // Rows begin where lines of a cache do, an odd number of them apart: an even number share a few places.
    const int64_t row_bytes = (weight_.padded_in * Kernel::kStepBytes / kLine | 1) * kLine;
    bytes.resize(size_t((rows + 15) / 16 * 16 * row_bytes + kLine));
    numbers.resize(size_t(2 * rows + weight_.in));
    const Tokens tokens{bytes.data() + (-reinterpret_cast<uintptr_t>(bytes.data()) & (kLine - 1)), row_bytes,
                        numbers.data(), numbers.data() + rows};
    quantize(first, rows, tokens, numbers.data() + 2 * rows);
    [[maybe_unused]] const typename Kernel::Registers registers{};
    for (int64_t half = 0; half < halves_; ++half)
      for (int64_t panel = half * panels_ + begin; panel < half * panels_ + end; panel += Kernel::kPanels) {
        const int panels = int(std::min<int64_t>(Kernel::kPanels, half * panels_ + end - panel));
        for (int64_t row = 0; row < rows; row += Kernel::kRows) {
          const int some = int(std::min<int64_t>(Kernel::kRows, rows - row));
          alignas(64) int32_t sums[Kernel::kRows * Kernel::kPanels * kLanes];
          const Factors factors{tokens.values + row * row_bytes,
                                weight_.values + panel * kLanes * weight_.padded_in,
                                weight_.start.data() + panel * kLanes,
                                (weight_.in + kQuad - 1) / kQuad * kQuad,
                                weight_.padded_in,
                                row_bytes};
          Kernel::multiply(some, panels, factors, sums);
          Kernel::finish(
              sums, some, panels,
              {tokens.scale + row, tokens.centre + row, weight_, around_, panel, first + row, residual_, y_});
        }
      }
  }

  void quantize(int64_t first, int64_t rows, const Tokens& tokens, float* normalized) {
    const int64_t in = weight_.in;
    const bool normalizes = around_.norm.kind != NormKind::kNone && !around_.norm_of_output;
    for (int64_t row = 0; row < rows; ++row) {
      const float* x = x_ + (first + row) * in;
      if (normalizes) {
        Kernel::normalize(x, in, around_.norm, normalized);
        x = normalized;
      }
      Kernel::quantize(x, in, weight_.padded_in, tokens.values + row * tokens.row_bytes, tokens.scale + row,
                       tokens.centre + row);
    }
  }

  const float* x_;
  const PackedWeight& weight_;
  const Around& around_;
  const float* residual_;
  int64_t tokens_;
  float* const* y_;
  int64_t halves_, panels_;  // panels of a half
};

template <class Kernel>
int64_t run_tiles(int64_t in, int64_t times) {
  constexpr int kRows = (Kernel::kRows + 15) / 16 * 16;
  const int64_t row_bytes = in * Kernel::kStepBytes;
  // Tiles are read in lines of a cache. All panels are the same one, so that a deep tile fits into the first cache.
  std::vector<uint8_t> bytes(size_t(kRows * row_bytes + kLanes * in + 64), 1);
  uint8_t* const rows = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(bytes.data()) + 63) / 64 * 64);
  const int8_t* const columns = reinterpret_cast<const int8_t*>(rows + kRows * row_bytes);
  const int32_t start[Kernel::kPanels * kLanes] = {};
  alignas(64) int32_t sums[Kernel::kRows * Kernel::kPanels * kLanes];
  [[maybe_unused]] const typename Kernel::Registers registers{};
  for (int64_t time = 0; time < times; ++time)
    Kernel::multiply(Kernel::kRows, Kernel::kPanels, {rows, columns, start, in, 0, row_bytes}, sums);
  return 2 * times * Kernel::kRows * Kernel::kPanels * kLanes * in;
}

}  // namespace

PackedWeight::PackedWeight(const int8_t* packed, const float* scales, const float* sums, const float* biases,
                           int64_t rows, std::vector<int64_t> columns_of_parts)
    : in(rows), padded_in((rows + kDepth - 1) / kDepth * kDepth), parts(std::move(columns_of_parts)), values(packed) {
  for (size_t part = 0; part < parts.size(); ++part)
    for (int64_t column = 0; column < parts[part]; column += kLanes) panels.push_back({int64_t(part), column});
  start.assign(panels.size() * kLanes, 0);
  scale.assign(panels.size() * kLanes, 0.0f);
  column_sum = bias = scale;
  int64_t column = 0;
  for (size_t panel = 0; panel < panels.size(); ++panel) {
    const size_t place = panel * kLanes;
    const int64_t many = std::min<int64_t>(kLanes, parts[size_t(panels[panel].part)] - panels[panel].column);
    std::copy(scales + column, scales + column + many, scale.begin() + int64_t(place));
    std::copy(sums + column, sums + column + many, column_sum.begin() + int64_t(place));
    if (biases != nullptr) std::copy(biases + column, biases + column + many, bias.begin() + int64_t(place));
    column += many;
    const int8_t* from = values + int64_t(place) * padded_in;
    for (int64_t quad = 0; quad < padded_in / kQuad; ++quad)
      for (int lane = 0; lane < kLanes; ++lane)
        for (int at = 0; at < kQuad; ++at) start[place + size_t(lane)] -= 128 * *from++;
  }
}

int64_t packed_size(int64_t in, const std::vector<int64_t>& parts) {
  int64_t panels = 0;
  for (const int64_t columns : parts) panels += (columns + kLanes - 1) / kLanes;
  return panels * kLanes * ((in + kDepth - 1) / kDepth * kDepth);
}

void int8_linear(const float* x, const PackedWeight& weight, const Around& around, const float* residual,
                 int64_t tokens, float* const* y, Isa isa, const Parallel& parallel) {
  switch (isa) {
#if defined(RTX_HAS_AMX)
    case Isa::kAvx512Amx:
      // A tile has 16 rows, and with fewer than half of them is slower than vectors are.
      if (tokens <= Avx512Vnni::kRows) return Run<Avx512Vnni>(x, weight, around, residual, tokens, y)(parallel);
      return Run<Amx>(x, weight, around, residual, tokens, y)(parallel);
#endif
#if defined(__x86_64__)
    case Isa::kAvx512Vnni:
      return Run<Avx512Vnni>(x, weight, around, residual, tokens, y)(parallel);
    case Isa::kAvxVnni:
      return Run<AvxVnni>(x, weight, around, residual, tokens, y)(parallel);
    case Isa::kAvx2:
      return Run<Avx2>(x, weight, around, residual, tokens, y)(parallel);
#endif
    default:
      return Run<Portable>(x, weight, around, residual, tokens, y)(parallel);
  }
}

int64_t int8_tiles(int64_t in, int64_t times, Isa isa) {
  switch (isa) {
#if defined(RTX_HAS_AMX)
    case Isa::kAvx512Amx:
      return run_tiles<Amx>(in, times);
#endif
#if defined(__x86_64__)
    case Isa::kAvx512Vnni:
      return run_tiles<Avx512Vnni>(in, times);
    case Isa::kAvxVnni:
      return run_tiles<AvxVnni>(in, times);
    case Isa::kAvx2:
      return run_tiles<Avx2>(in, times);
#endif
    default:
      return run_tiles<Portable>(in, times);
  }
}

}  // namespace rtx
