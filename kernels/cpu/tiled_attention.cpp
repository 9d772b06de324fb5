#include "tiled_attention.h"

#if defined(RTX_HAS_AMX)

#include <algorithm>
#include <vector>

#include "tiles.h"

// Scores decide exponentially, so that queries and keys are each the sum of two numbers of bfloat16, which leaves out
// less than 2^-16 of a product. Weights and values are rounded to one: what that costs is of the size of values, not of
// scores.
//
// A softmax needs its largest score only against overflow. Where a bound on all scores of a block tells that there is
// none, weights are 2^score, a group of keys after the other. Their sum is one more column of values, which are 1.

namespace rtx {
namespace {

// Rows of a tile; numbers of bfloat16 in one of its rows, which are also what a product sums over; terms of a number.
constexpr int kTileRows = 16, kTileDepth = 32, kTerms = 2;
constexpr int64_t kTileNumbers = kTileRows * kTileDepth, kTileSums = kTileRows * kLanes;
// Rows that are computed at once, in two tiles, and keys, likewise.
constexpr int64_t kBlock = 2 * kTileRows;
// Keys whose scores fit into the first cache.
constexpr int64_t kGroup = 4 * kBlock;
// 2^kMostScore times kMostValue (2^40) times every number of keys is still a number, and 2^-kMostScore times
// kLeastValue (2^-40) is not below what tiles take for 0.
constexpr float kMostScore = 64.0f, kMostValue = 1.09951163e12f, kLeastValue = 9.09494702e-13f;

using Bfloat16 = uint16_t;

constexpr int64_t tiles_of(int64_t numbers, int64_t size) { return (numbers + size - 1) / size; }

// What lanes are below a count, which may be negative or more than there are.
RTX_INLINE __mmask16 first_lanes(int64_t count) { return __mmask16((1u << std::clamp<int64_t>(count, 0, kLanes)) - 1); }

// Of 32 numbers, a and b: what bfloat16 holds of them, and what it holds of the rest.
RTX_AMX RTX_INLINE void split(__m512 a, __m512 b, __m512i* high, __m512i* low) {
  *high = (__m512i)_mm512_cvtne2ps_pbh(b, a);
  const __m512 rest_a = a - (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(*high)), 16);
  const __m512 rest_b = b - (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(*high, 1)), 16);
  *low = (__m512i)_mm512_cvtne2ps_pbh(rest_b, rest_a);
}

// rows[i][j] to rows[j][i].
RTX_AMX RTX_INLINE void transpose(__m512i (&rows)[16]) {
  __m512i other[16];
  // Rows by twos, and these by twos.
  RTX_FOR (at, 8) {
    other[2 * at] = _mm512_unpacklo_epi32(rows[2 * at], rows[2 * at + 1]);
    other[2 * at + 1] = _mm512_unpackhi_epi32(rows[2 * at], rows[2 * at + 1]);
  }
  RTX_FOR (at, 4) {
    rows[4 * at] = _mm512_unpacklo_epi64(other[4 * at], other[4 * at + 2]);
    rows[4 * at + 1] = _mm512_unpackhi_epi64(other[4 * at], other[4 * at + 2]);
    rows[4 * at + 2] = _mm512_unpacklo_epi64(other[4 * at + 1], other[4 * at + 3]);
    rows[4 * at + 3] = _mm512_unpackhi_epi64(other[4 * at + 1], other[4 * at + 3]);
  }
  // Quarters of registers: rows[4 * i + j] has, in quarter q, column 4 * q + j of rows 4 * i ... 4 * i + 3.
  RTX_FOR (at, 4) {
    const __m512i low_a = _mm512_shuffle_i32x4(rows[at], rows[at + 4], 0x44);
    const __m512i high_a = _mm512_shuffle_i32x4(rows[at], rows[at + 4], 0xee);
    const __m512i low_b = _mm512_shuffle_i32x4(rows[at + 8], rows[at + 12], 0x44);
    const __m512i high_b = _mm512_shuffle_i32x4(rows[at + 8], rows[at + 12], 0xee);
    other[at] = _mm512_shuffle_i32x4(low_a, low_b, 0x88);
    other[at + 4] = _mm512_shuffle_i32x4(low_a, low_b, 0xdd);
    other[at + 8] = _mm512_shuffle_i32x4(high_a, high_b, 0x88);
    other[at + 12] = _mm512_shuffle_i32x4(high_a, high_b, 0xdd);
  }
  RTX_FOR (at, 16) rows[at] = other[at];
}

// Rows of `width` numbers, `stride` apart, and each times a factor, to tiles [rows / 16][width / 32][term], rows of
// which are numbers of one row. Rows and numbers that are missing are 0. `most`, [width / 32][2][16]: the largest
// magnitude of each number.
RTX_AMX void pack_queries(const float* from, int64_t stride, int64_t rows, int64_t width, float factor, Bfloat16* to,
                          __m512* most) {
  const int64_t chunks = tiles_of(width, kTileDepth);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t left = width - chunk * kTileDepth;
    const __mmask16 lanes = first_lanes(left), more_lanes = first_lanes(left - kLanes);
    __m512 largest[2] = {};
    for (int64_t row = 0; row < tiles_of(rows, kTileRows) * kTileRows; ++row) {
      Bfloat16* tile = to + (row / kTileRows * chunks + chunk) * kTerms * kTileNumbers + row % kTileRows * kTileDepth;
      __m512i high = _mm512_setzero_si512(), low = high;
      if (row < rows) {
        const float* numbers = from + row * stride + chunk * kTileDepth;
        const __m512 a = _mm512_maskz_loadu_ps(lanes, numbers) * factor;
        const __m512 b = _mm512_maskz_loadu_ps(more_lanes, numbers + kLanes) * factor;
        largest[0] = _mm512_max_ps(_mm512_abs_ps(a), largest[0]);
        largest[1] = _mm512_max_ps(_mm512_abs_ps(b), largest[1]);
        split(a, b, &high, &low);
      }
      _mm512_store_si512(tile, high);
      _mm512_store_si512(tile + kTileNumbers, low);
    }
    most[2 * chunk] = largest[0];
    most[2 * chunk + 1] = largest[1];
  }
}

// Keys to tiles [keys / 16, an even number][width / 32][term], rows of which are two numbers of 16 keys; `most` as
// above.
RTX_AMX void pack_keys(const float* from, int64_t stride, int64_t length, int64_t width, Bfloat16* to, __m512* most) {
  const int64_t chunks = tiles_of(width, kTileDepth);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t left = width - chunk * kTileDepth;
    const __mmask16 lanes = first_lanes(left), more_lanes = first_lanes(left - kLanes);
    __m512 largest[2] = {};
    for (int64_t first = 0; first < tiles_of(length, kBlock) * kBlock; first += kTileRows) {
      Bfloat16* tile = to + (first / kTileRows * chunks + chunk) * kTerms * kTileNumbers;
      __m512i high[kTileRows], low[kTileRows];
      for (int row = 0; row < kTileRows; ++row) {
        high[row] = low[row] = _mm512_setzero_si512();
        if (first + row >= length) continue;
        const float* numbers = from + (first + row) * stride + chunk * kTileDepth;
        const __m512 a = _mm512_maskz_loadu_ps(lanes, numbers);
        const __m512 b = _mm512_maskz_loadu_ps(more_lanes, numbers + kLanes);
        largest[0] = _mm512_max_ps(_mm512_abs_ps(a), largest[0]);
        largest[1] = _mm512_max_ps(_mm512_abs_ps(b), largest[1]);
        split(a, b, &high[row], &low[row]);
      }
      transpose(high);
      transpose(low);
      for (int row = 0; row < kTileRows; ++row) {
        _mm512_store_si512(tile + row * kTileDepth, high[row]);
        _mm512_store_si512(tile + kTileNumbers + row * kTileDepth, low[row]);
      }
    }
    most[2 * chunk] = largest[0];
    most[2 * chunk + 1] = largest[1];
  }
}

// Values to tiles [keys / 32][(width + 1) / 16], rows of which are 16 columns of two keys; the last column is 1.
// Returns the largest magnitude.
RTX_AMX float pack_values(const float* from, int64_t stride, int64_t length, int64_t width, Bfloat16* to) {
  alignas(64) static constexpr struct Order {
    constexpr Order() : places() {
      for (uint16_t at = 0; at < kTileDepth; ++at) places[at] = uint16_t(at / 2 + at % 2 * kLanes);
    }
    uint16_t places[kTileDepth];
  } kOrder;
  const __m512i order = _mm512_load_si512(kOrder.places);
  const __m512 one = _mm512_set1_ps(1.0f);
  const int64_t columns = tiles_of(width + 1, kLanes);
  __m512 largest = {};
  for (int64_t column = 0; column < columns; ++column) {
    const __mmask16 lanes = first_lanes(width - column * kLanes);
    const __mmask16 ones = first_lanes(width + 1 - column * kLanes) & ~lanes;
    const float* numbers = from + column * kLanes;
    for (int64_t key = 0; key < tiles_of(length, kBlock) * kBlock; key += 2) {
      __m512 pair[2] = {};
      for (int64_t at = 0; at < 2 && key + at < length; ++at) {
        const __m512 some = _mm512_maskz_loadu_ps(lanes, numbers + (key + at) * stride);
        largest = _mm512_max_ps(_mm512_abs_ps(some), largest);
        pair[at] = _mm512_mask_mov_ps(some, ones, one);
      }
      _mm512_store_si512(to + (key / kBlock * columns + column) * kTileNumbers + key % kBlock / 2 * kTileDepth,
                         _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(pair[1], pair[0])));
    }
  }
  return _mm512_reduce_max_ps(largest);
}

// One block of queries against 32 keys: scores, tiles of 16 by 16, of which those of the second 16 rows are `below`
// numbers behind the first ones. The least terms are added first.
template <bool kTwoTiles>
RTX_AMX RTX_INLINE void score(const Bfloat16* queries, const Bfloat16* keys, int64_t chunks, float* scores,
                              int64_t below) {
  settle();
  const int64_t next = chunks * kTerms * kTileNumbers;  // the next 16 of them
  const int64_t row_bytes = kTileDepth * sizeof(Bfloat16);
  _tile_zero(0);
  _tile_zero(1);
  if (kTwoTiles) _tile_zero(2);
  if (kTwoTiles) _tile_zero(3);
  for (int64_t chunk = 0; chunk < chunks; ++chunk, queries += kTerms * kTileNumbers, keys += kTerms * kTileNumbers) {
    _tile_loadd(4, queries + kTileNumbers, row_bytes);
    _tile_loadd(6, keys, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, keys + next, row_bytes);
    _tile_dpbf16ps(1, 4, 7);
    if (kTwoTiles) {
      _tile_loadd(5, queries + next + kTileNumbers, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_loadd(4, queries, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (kTwoTiles) {
      _tile_loadd(5, queries + next, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_loadd(6, keys + kTileNumbers, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, keys + next + kTileNumbers, row_bytes);
    _tile_dpbf16ps(1, 4, 7);
    if (kTwoTiles) {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, scores, row_bytes);
  _tile_stored(1, scores + kTileSums, row_bytes);
  if (kTwoTiles) _tile_stored(2, scores + below, row_bytes);
  if (kTwoTiles) _tile_stored(3, scores + below + kTileSums, row_bytes);
}

// Weights, tiles [keys / 32] of which those of the second 16 rows are `below` numbers behind the first ones, times
// values from a pair of column tiles on, or a last one, added to sums, tiles [rows / 16][columns], unless it is first.
template <bool kTwoTiles, bool kTwoColumns>
RTX_AMX RTX_INLINE void mix(const Bfloat16* weights, int64_t below, const Bfloat16* values, int64_t columns,
                            int64_t chunks, bool is_first, float* sums) {
  const int64_t row_bytes = kTileDepth * sizeof(Bfloat16);
  float* const sums_below = sums + columns * kTileSums;
  settle();
  if (is_first) {
    _tile_zero(0);
    if (kTwoColumns) _tile_zero(1);
    if (kTwoTiles) _tile_zero(2);
    if (kTwoTiles && kTwoColumns) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, row_bytes);
    if (kTwoColumns) _tile_loadd(1, sums + kTileSums, row_bytes);
    if (kTwoTiles) _tile_loadd(2, sums_below, row_bytes);
    if (kTwoTiles && kTwoColumns) _tile_loadd(3, sums_below + kTileSums, row_bytes);
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk, weights += kTileNumbers, values += columns * kTileNumbers) {
    _tile_loadd(4, weights, row_bytes);
    _tile_loadd(6, values, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (kTwoColumns) {
      _tile_loadd(7, values + kTileNumbers, row_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kTwoTiles) {
      _tile_loadd(5, weights + below, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if (kTwoTiles && kTwoColumns) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, row_bytes);
  if (kTwoColumns) _tile_stored(1, sums + kTileSums, row_bytes);
  if (kTwoTiles) _tile_stored(2, sums_below, row_bytes);
  if (kTwoTiles && kTwoColumns) _tile_stored(3, sums_below + kTileSums, row_bytes);
}

// 2^x with a relative error below 1e-4, a fraction of what bfloat16 leaves out; NaN of NaN.
RTX_AMX RTX_INLINE __m512 rough_power_of_two(__m512 x) {
  const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  // Of degree 3, with the least largest relative error on 0 ... 1 of those that are 1 at 0.
  __m512 series = rest * 0.07706717f + 0.22764485f;
  series = series * rest + 0.69511682f;
  series = series * rest + 1.0f;
  return _mm512_scalef_ps(series, x);
}

// Which of 32 keys each of 16 rows sees, if not all see all.
struct Seen {
  const AttentionShape& shape;
  int64_t length, first;  // the first row

  bool all(int64_t key) const {
    return key >= shape.low(first + kTileRows - 1) && key + kBlock <= shape.high(first, length);
  }
  __mmask16 lanes(int64_t row, int64_t key) const {
    return __mmask16(first_lanes(shape.high(first + row, length) - key) & ~first_lanes(shape.low(first + row) - key));
  }
};

// The largest score of each of 16 rows over all keys that it sees; the others' are put below every score.
RTX_AMX void find_largest(float* scores, int64_t begin, int64_t end, const Seen& seen, float* largest) {
  __m512i most[kTileRows];
  for (int row = 0; row < kTileRows; ++row) most[row] = (__m512i)_mm512_set1_ps(kUnseen);
  for (int64_t key = begin; key < end; key += kLanes, scores += kTileSums) {
    const bool all = seen.all(key / kBlock * kBlock);
    for (int row = 0; row < kTileRows; ++row) {
      __m512 some = _mm512_load_ps(scores + row * kLanes);
      if (!all) {
        some = _mm512_mask_mov_ps(_mm512_set1_ps(kUnseen), seen.lanes(row, key), some);
        _mm512_store_ps(scores + row * kLanes, some);
      }
      most[row] = (__m512i)_mm512_max_ps(some, (__m512)most[row]);
    }
  }
  transpose(most);
  __m512 found = (__m512)most[0];
  for (int row = 1; row < kTileRows; ++row) found = _mm512_max_ps((__m512)most[row], found);
  _mm512_storeu_ps(largest, found);
}

// Scores of 16 rows to weights, 2^(score - the row's largest), and 0 where a key is not seen. Keys behind the last have
// values of 0, whatever their weight.
RTX_AMX void weigh(const float* scores, int64_t begin, int64_t end, const Seen& seen, const float* largest,
                   Bfloat16* weights) {
  const bool hides = seen.shape.causal || seen.shape.window >= 0;
  for (int64_t key = begin; key < end; key += kBlock, scores += 2 * kTileSums, weights += kTileNumbers) {
    const bool all = !hides || seen.all(key);
    RTX_FOR (row, kTileRows) {
      const __m512 top = _mm512_set1_ps(largest[row]);
      __m512 a = rough_power_of_two(_mm512_load_ps(scores + row * kLanes) - top);
      __m512 b = rough_power_of_two(_mm512_load_ps(scores + kTileSums + row * kLanes) - top);
      if (!all) {
        a = _mm512_maskz_mov_ps(seen.lanes(row, key), a);
        b = _mm512_maskz_mov_ps(seen.lanes(row, key + kLanes), b);
      }
      _mm512_store_si512(weights + row * kTileDepth, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
  }
}

// One sequence's heads that share one of keys.
struct Task {
  const float* query;
  int64_t length;
  const AttentionShape& shape;
  float* y;
  int64_t chunks, columns;  // tiles of a query or key, and of a value with its 1
  const Bfloat16 *keys, *values;
  const __m512* most_key;
  float most_value;
  // Room for a block:
  __m512* most_query;
  Bfloat16 *queries, *weights;
  float *scores, *sums;

  int64_t row_stride() const { return shape.heads * shape.width; }
};

// Up to 32 rows of one head, and the keys that they see, a group after the other.
struct Block {
  int64_t head, first, rows, begin, end, group;
  bool small;  // whether no score needs the largest one taken off
};

RTX_AMX Block prepare(const Task& task, int64_t head, int64_t first) {
  const AttentionShape& shape = task.shape;
  Block block{head, first, std::min(kBlock, task.length - first), 0, 0, kGroup, true};
  block.begin = shape.low(first) / kBlock * kBlock;
  block.end = tiles_of(shape.high(first + block.rows - 1, task.length), kBlock) * kBlock;
  const float factor = shape.scale * 1.44269504f;  // powers of 2 in place of e
  pack_queries(task.query + head * shape.width + first * task.row_stride(), task.row_stride(), block.rows, shape.width,
               factor, task.queries, task.most_query);
  __m512 bound = {};
  for (int64_t at = 0; at < 2 * task.chunks; ++at) bound += task.most_query[at] * task.most_key[at];
  const bool usual = task.most_value >= kLeastValue && task.most_value <= kMostValue;
  if (!(_mm512_reduce_add_ps(bound) <= kMostScore && usual)) {
    block.small = false;
    block.group = block.end - block.begin;
  }
  return block;
}

// Of keys group ... stop - 1.
template <bool kTwoTiles>
RTX_AMX void score_group(const Task& task, int64_t group, int64_t stop) {
  for (int64_t key = group; key < stop; key += kBlock)
    score<kTwoTiles>(task.queries, task.keys + key / kTileRows * task.chunks * kTerms * kTileNumbers, task.chunks,
                     task.scores + (key - group) * kTileRows, (stop - group) * kTileRows);
}

template <bool kTwoTiles>
RTX_AMX void weigh_group(const Task& task, const Block& block, int64_t group, int64_t stop) {
  for (int tile = 0; tile < (kTwoTiles ? 2 : 1); ++tile) {
    const Seen seen{task.shape, task.length, block.first + tile * kTileRows};
    float largest[kTileRows] = {};
    float* const scores = task.scores + tile * (stop - group) * kTileRows;
    if (!block.small) find_largest(scores, group, stop, seen, largest);
    weigh(scores, group, stop, seen, largest, task.weights + tile * (stop - group) * kTileRows);
  }
}

template <bool kTwoTiles>
RTX_AMX void mix_group(const Task& task, int64_t group, int64_t stop, bool is_first) {
  for (int64_t column = 0; column < task.columns; column += 2) {
    const Bfloat16* values = task.values + (group / kBlock * task.columns + column) * kTileNumbers;
    float* sums = task.sums + column * kTileSums;
    auto* mix_columns = column + 1 < task.columns ? mix<kTwoTiles, true> : mix<kTwoTiles, false>;
    mix_columns(task.weights, (stop - group) * kTileRows, values, task.columns, (stop - group) / kBlock, is_first,
                sums);
  }
}

RTX_AMX void finish(const Task& task, const Block& block) {
  const int64_t width = task.shape.width;
  for (int64_t row = 0; row < block.rows; ++row) {
    const float* from = task.sums + row / kTileRows * task.columns * kTileSums + row % kTileRows * kLanes;
    const float factor = 1.0f / from[width / kLanes * kTileSums + width % kLanes];
    float* to = task.y + block.head * width + (block.first + row) * task.row_stride();
    for (int64_t column = 0; column < width; column += kLanes)
      _mm512_mask_storeu_ps(to + column, first_lanes(width - column),
                            _mm512_load_ps(from + column * kTileRows) * factor);
  }
}

// What vectors have written is not at once there for tiles, so that something else is done before it is taken: between
// weighing and mixing, the next group is scored, or the next block prepared. Returns the next block.
template <bool kTwoTiles>
RTX_AMX RTX_APART Block attend(const Task& task, const Block& block) {
  Block next{};
  const auto stop_of = [&](int64_t group) { return std::min(group + block.group, block.end); };
  score_group<kTwoTiles>(task, block.begin, stop_of(block.begin));
  for (int64_t group = block.begin; group < block.end; group += block.group) {
    const int64_t stop = stop_of(group);
    weigh_group<kTwoTiles>(task, block, group, stop);
    const int64_t behind = block.first + block.rows;
    if (stop < block.end)
      score_group<kTwoTiles>(task, stop, stop_of(stop));
    else if (behind < task.length)
      next = prepare(task, block.head, behind);
    else if (block.head + 1 < task.shape.heads / task.shape.key_heads)
      next = prepare(task, block.head + 1, 0);
    mix_group<kTwoTiles>(task, group, stop, group == block.begin);
  }
  finish(task, block);
  return next;
}

// Where room for so many numbers begins, in bytes, behind what was taken before.
template <class Number>
int64_t take(int64_t* bytes, int64_t count) {
  const int64_t begin = *bytes;
  *bytes += tiles_of(count * int64_t(sizeof(Number)), 64) * 64;
  return begin;
}

}  // namespace

RTX_AMX void tiled_attention(const float* query, const float* key, const float* value, int64_t length,
                             const AttentionShape& shape, float* y) {
  const int64_t width = shape.width, row = shape.key_heads * width;
  const int64_t chunks = tiles_of(width, kTileDepth), columns = tiles_of(width + 1, kLanes);
  const int64_t padded = tiles_of(length, kBlock) * kBlock;
  int64_t bytes = 0;
  const int64_t keys_at = take<Bfloat16>(&bytes, padded * chunks * kTerms * kTileDepth);
  const int64_t values_at = take<Bfloat16>(&bytes, padded * columns * kLanes);
  const int64_t queries_at = take<Bfloat16>(&bytes, kBlock * chunks * kTerms * kTileDepth);
  const int64_t weights_at = take<Bfloat16>(&bytes, kBlock * padded);
  const int64_t scores_at = take<float>(&bytes, kBlock * padded);
  const int64_t sums_at = take<float>(&bytes, kBlock * columns * kLanes);
  const int64_t most_key_at = take<__m512>(&bytes, 2 * chunks), most_query_at = take<__m512>(&bytes, 2 * chunks);
  thread_local std::vector<uint8_t> scratch;
  if (int64_t(scratch.size()) < bytes + 64) scratch.resize(size_t(bytes + 64));
  uint8_t* const room = scratch.data() + (-reinterpret_cast<uintptr_t>(scratch.data()) & 63);
  Bfloat16 *keys = reinterpret_cast<Bfloat16*>(room + keys_at), *values = reinterpret_cast<Bfloat16*>(room + values_at);
  __m512* most_key = reinterpret_cast<__m512*>(room + most_key_at);
  Task task{query, length, shape, y, chunks, columns, keys, values, most_key};
  task.most_query = reinterpret_cast<__m512*>(room + most_query_at);
  task.queries = reinterpret_cast<Bfloat16*>(room + queries_at);
  task.weights = reinterpret_cast<Bfloat16*>(room + weights_at);
  task.scores = reinterpret_cast<float*>(room + scores_at);
  task.sums = reinterpret_cast<float*>(room + sums_at);
  pack_keys(key, row, length, width, keys, most_key);
  task.most_value = pack_values(value, row, length, width, values);
  const Tiles tiles;
  for (Block block = prepare(task, 0, 0); block.rows > 0;)
    block = block.rows > kTileRows ? attend<true>(task, block) : attend<false>(task, block);
}

}  // namespace rtx

#endif
