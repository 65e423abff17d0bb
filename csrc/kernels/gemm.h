// The one matrix product under every kernel: a tile of rows by vectors held in registers, over a packed right operand.
//
// The right operand B [K, N] is packed into panels of at most kPanelVectors vectors, each panel holding its columns of
// row 0, then of row 1, and so on, so that the innermost loop reads it as one stream:
// [panel][ceil(K / group)][vectors][lanes][group]. `group` is 1, or 2 where an instruction multiplies pairs (bf16).
#pragma once

#include "simd.h"

namespace genkernels::GENKERNELS_LEVEL {

constexpr int kPanelVectors = 3;

// Longest run of products summed in registers before it is added to the total. One chain over all of K has twice
// PyTorch's rounding error at K = 512 and ten times at 8192; 256 costs one addition in 256.
constexpr int64_t kChain = 256;

// Rows that are multiplied with one run of a panel before the next.
constexpr int kRunRows = 8;

// The type operands are multiplied in. bf16 is multiplied as it is where the CPU can, else widened when packed, as
// float16 is.
template <class T>
struct OperandOf {
  using type = T;
};
template <>
struct OperandOf<float16> {
  using type = float;
};
#if !defined(__AVX512BF16__)
template <>
struct OperandOf<bfloat16> {
  using type = float;
};
#endif
template <class T>
using Operand = typename OperandOf<T>::type;

template <class E>
constexpr int kGroup = 1;
template <>
constexpr int kGroup<bfloat16> = 2;

#if defined(__AVX512BF16__)
// Floats as bf16, one behind the other, and the pairs of two rows. Subnormal numbers become 0, which they are in a
// product of pairs.
GENKERNELS_INLINE __m512i narrowed(const float* from) {
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + kLanes<float>), _mm512_loadu_ps(from));
}
GENKERNELS_INLINE Vector<uint32_t> paired(Vector<float> even, Vector<float> odd) {
  const auto bits = [](Vector<float> x) __attribute__((always_inline)) {
    return (Vector<uint32_t>)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)_mm512_cvtneps_pbh((__m512)x));
  };
  return bits(even) | bits(odd) << 16;
}
#endif

template <class E, int kVectors>
struct Panel {
  static constexpr int64_t kStep = kVectors * kLanes<E> * kGroup<E>;  // elements per group of rows
};

// What is fetched while a product goes on: with each group of k a line of what `at` and `stride` lead through, into L1
// or L2, and the panel's own lines of kGroupsAhead groups later, which L2 would deliver too late. Where a run of the
// panel stays in L1 for several tiles, nothing has to be fetched into it.
constexpr bool kFetchesIntoL1 = true;
enum class Into { L1, L2 };
constexpr int kGroupsAhead = 8;
template <Into kCache>
struct Ahead {
  const char* at;
  ptrdiff_t stride = kVectorBytes;

  template <int kVectors, class E>
  GENKERNELS_INLINE void fetch(const E* panel, ptrdiff_t step) {
    __builtin_prefetch(at, 0, kCache == Into::L1 ? 3 : 2);
    at += stride;
#pragma GCC unroll 4
    for (int line = 0; line < kVectors * kVectorBytes; line += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(panel + kGroupsAhead * step) + line, 0, 3);
  }
  GENKERNELS_INLINE Ahead from(int64_t group) const { return {at + group * stride, stride}; }
};

struct NothingAhead {
  template <int kVectors, class E>
  GENKERNELS_INLINE void fetch(const E*, ptrdiff_t) const {}
  GENKERNELS_INLINE NothingAhead from(int64_t) const { return {}; }
};

// sum[i][v] += a[i][:] b[:][v] for K products. Row i of `a` starts at a + i * row_stride; `step` elements lie between
// one group of k and the next, and `b_step` in b, which need not be a packed panel.
template <class E, int kRows, int kVectors, class Next = NothingAhead>
GENKERNELS_INLINE void multiply(const E* a, ptrdiff_t row_stride, ptrdiff_t step, const E* b, int64_t K,
                                Vector<E> (&sum)[kRows][kVectors], Next ahead = {},
                                ptrdiff_t b_step = kVectors * kLanes<E>) {
  for (int64_t k = 0; k < K; ++k) {
    ahead.template fetch<kVectors>(b, b_step);
    Vector<E> column[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      Vector<E> loaded = load(b + v * kLanes<E>);
#if defined(__AVX2__) && !defined(__AVX512F__)
      asm("" : "+x"(loaded));  // GCC would load it again for each row, which is more than the ports can take
#endif
      column[v] = loaded;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vector<E> row = broadcast(a[i * row_stride]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[i][v] += row * column[v];
    }
    a += step;
    b += b_step;
  }
}

#if defined(__AVX512BF16__)
template <class E, int kRows, int kVectors, class Next = NothingAhead>
GENKERNELS_INLINE void multiply(const bfloat16* a, ptrdiff_t row_stride, ptrdiff_t step, const bfloat16* b, int64_t K,
                                Vector<float> (&sum)[kRows][kVectors], Next ahead = {},
                                ptrdiff_t b_step = 2 * kVectors * kLanes<float>) {
  constexpr int kPair = 2 * kLanes<float>;
  const auto pairs = [&](auto load_pair) __attribute__((always_inline)) {
    __m512bh column[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) column[v] = (__m512bh)_mm512_loadu_si512(b + v * kPair);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const __m512bh row = (__m512bh)_mm512_set1_epi32(load_pair(a + i * row_stride));
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[i][v] = (Vector<float>)_mm512_dpbf16_ps((__m512)sum[i][v], row, column[v]);
    }
  };
  for (int64_t k = 0; k + 1 < K; k += 2) {
    ahead.template fetch<kVectors>(b, b_step);
    pairs([](const bfloat16* at) {
      int pair;
      __builtin_memcpy(&pair, at, sizeof pair);
      return pair;
    });
    a += step;
    b += b_step;
  }
  // An odd K ends in half a pair: the element after it may belong to someone else, or to nobody.
  if (K % 2) pairs([](const bfloat16* at) { return int(at->bits); });
}
#endif

template <int kMost, class Body>
GENKERNELS_INLINE void for_last_rows(int64_t rows, int64_t first, const Body& body) {
  if constexpr (kMost > 0) {
    if (rows == kMost) return body.template operator()<kMost>(first);
    for_last_rows<kMost - 1>(rows, first, body);
  }
}

// Calls body.operator()<rows>(first) for tiles of kRows rows and once for the rows left over.
template <int kRows = kTileRows, class Body>
GENKERNELS_INLINE void for_row_tiles(int64_t rows, const Body& body) {
  int64_t first = 0;
  for (; first + kRows <= rows; first += kRows) body.template operator()<kRows>(first);
  for_last_rows<kRows - 1>(rows - first, first, body);
}

// The whole product of a tile, summed in chains: total[i][v] = a[i][:] b[:][v].
template <class E, int kRows, int kVectors, int64_t kLongest>
GENKERNELS_INLINE void product(const E* a, ptrdiff_t row_stride, ptrdiff_t step, const E* b, int64_t K,
                               Vector<E> (&total)[kRows][kVectors], ptrdiff_t b_step = Panel<E, kVectors>::kStep) {
  for (int64_t k = 0; k < K || k == 0; k += kLongest) {
    Vector<E> sum[kRows][kVectors] = {};
    multiply<E, kRows, kVectors>(
        a + k / kGroup<E> * step, row_stride, step, b + k / kGroup<E> * b_step, smaller(kLongest, K - k), sum,
        Ahead<Into::L1>{reinterpret_cast<const char*>(a + (k / kGroup<E> + kGroupsAhead) * step),
                        step * int64_t(sizeof(E))},
        b_step);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) total[i][v] = k == 0 ? sum[i][v] : total[i][v] + sum[i][v];
  }
}

// total[i][v] = a[i][:] b[:][v] for so few rows that a chain a sum would wait for the adder: each sum has several.
template <class E, int kRows, int kVectors>
GENKERNELS_INLINE void product_of_few_rows(const E* a, ptrdiff_t row_stride, const E* b, int64_t K,
                                           Vector<E> (&total)[kRows][kVectors]) {
  constexpr int kChains = kRows == 1 ? 4 : kRows <= (kVectorBytes == 64 ? 3 : 2) ? 2 : 1;
  constexpr int64_t kTogether = kChains * kGroup<E>;
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVectors; ++v) total[i][v] = Vector<E>{};
  for (int64_t first = 0; first < K; first += kChain * kChains) {
    const int64_t last = smaller(K, first + kChain * kChains);
    Vector<E> sum[kChains][kRows][kVectors] = {};
    int64_t k = first;
    for (; k + kTogether <= last; k += kTogether)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        multiply<E, kRows, kVectors>(a + k + c * kGroup<E>, row_stride, kGroup<E>, b, kGroup<E>, sum[c]);
        b += Panel<E, kVectors>::kStep;
      }
    multiply<E, kRows, kVectors>(a + k, row_stride, kGroup<E>, b, last - k, sum[0]);
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) total[i][v] += sum[c][i][v];
  }
}

// total[i][v] = a[i][:] b[:][v] for at most kRunRows rows.
template <class E, int kVectors, class Next = NothingAhead>
GENKERNELS_INLINE void product_of_rows(const E* a, ptrdiff_t row_stride, int64_t rows, const E* b, int64_t K,
                                       Vector<E> (&total)[kRunRows][kVectors], Next ahead = {},
                                       ptrdiff_t b_step = Panel<E, kVectors>::kStep) {
  for (int64_t k = 0; k < K || k == 0; k += kChain)
    for_row_tiles(rows, [&]<int kRows>(int64_t first) {
      Vector<E> sum[kRows][kVectors] = {};
      multiply<E, kRows, kVectors>(a + first * row_stride + k, row_stride, kGroup<E>, b + k / kGroup<E> * b_step,
                                   smaller(kChain, K - k), sum, ahead.from(k / kGroup<E>), b_step);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) total[first + i][v] = k == 0 ? sum[i][v] : total[first + i][v] + sum[i][v];
    });
}

// How N columns are cut into panels: as few as fit, or as many more as can be shared out evenly, their widths differing
// by at most one vector, so that 64 columns are 2 + 2 vectors and not 3 + 1 (a tile one vector wide waits for the
// adder).
template <class E>
struct Columns {
  int64_t count;    // columns
  int64_t vectors;  // vectors that hold them, the last one perhaps in part
  int64_t panels;

  explicit Columns(int64_t n, int64_t shares = 1)
      : count(n),
        vectors(ceil_div(n, kLanes<E>)),
        panels(smaller(ceil_div(ceil_div(vectors, kPanelVectors), shares) * shares, vectors)) {}

  int64_t first_vector(int64_t panel) const { return panels == 0 ? 0 : panel * vectors / panels; }
  int64_t width(int64_t panel) const { return first_vector(panel + 1) - first_vector(panel); }
  int64_t first_column(int64_t panel) const { return first_vector(panel) * kLanes<E>; }
  // Elements from the packed start to a panel of K rows, and of all panels.
  int64_t offset(int64_t panel, int64_t K) const { return first_column(panel) * ceil_div(K, kGroup<E>) * kGroup<E>; }
  int64_t packed_size(int64_t K) const { return offset(panels, K); }

  // Calls body.operator()<vectors>().
  template <class Body>
  GENKERNELS_INLINE void with_width(int64_t panel, const Body& body) const {
    static_assert(kPanelVectors == 3);
    switch (width(panel)) {
      case 1: return body.template operator()<1>();
      case 2: return body.template operator()<2>();
      default: return body.template operator()<3>();
    }
  }
};

// Packs one panel of B. row(k) gives the address of row k of B, or null for a row of zeros.
template <class E, class T, class Row>
void pack_panel(const Columns<E>& columns, int64_t panel, int64_t K, const Row& row, E* to) {
  constexpr int kGroupSize = kGroup<E>;
  const int64_t first = columns.first_column(panel);
  const int64_t width = columns.width(panel) * kLanes<E>;
  const int64_t used = smaller(columns.count - first, width);
  for (int64_t k = 0; k < K; k += kGroupSize, to += width * kGroupSize) {
#if defined(__AVX512BF16__)
    if constexpr (kGroupSize == 2) {
      const T *even = row(k), *odd = k + 1 < K ? row(k + 1) : nullptr;
      if (even != nullptr && odd != nullptr) {
        for (int64_t n = 0; n < width; n += kLanes<E>) {
          const int count = int(larger(0, smaller(kLanes<E>, used - n)));
          const Vector<float> lower = load(even + first + n, count), upper = load(odd + first + n, count);
          store((uint32_t*)(to + n * 2), __is_same(T, bfloat16)
                                             ? (Vector<uint32_t>)lower >> 16 | (Vector<uint32_t>)upper
                                             : paired(lower, upper));
        }
        continue;
      }
    }
#endif
    if constexpr (kGroupSize == 1) {
      if (const T* from = row(k); from != nullptr && used == width) {
        for (int64_t n = 0; n < width; n += kLanes<E>) store(to + n, load(from + first + n));
        continue;
      }
    }
    for (int g = 0; g < kGroupSize; ++g) {
      const T* from = k + g < K ? row(k + g) : nullptr;
      if (from == nullptr) {
        for (int64_t n = 0; n < width; ++n) to[n * kGroupSize + g] = E{};
        continue;
      }
      for (int64_t n = 0; n < used; ++n) to[n * kGroupSize + g] = as<E>(from[first + n]);
      for (int64_t n = used; n < width; ++n) to[n * kGroupSize + g] = E{};
    }
  }
}

// Elements of a packed tile from one group of k to the next.
template <class E>
constexpr int64_t kTileStep = kTileRows * kGroup<E>;

// Packs kTileRows columns of A [K, columns] as the rows of a tile of A^T: [ceil(K / group)][kTileRows][group].
template <class E>
void pack_transposed(const E* from, int64_t stride, int64_t K, int64_t count, E* packed) {
  constexpr int kGroupSize = kGroup<E>;
  int64_t k = 0;
  if (count == kTileRows)
    for (; k + kGroupSize <= K; k += kGroupSize, packed += kTileStep<E>) {
      const E* const row = from + k * stride;
#if defined(__AVX512BF16__)
      if constexpr (kGroupSize == 2) {  // which GCC would go through element by element
        const __m128i even = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
        const __m128i odd = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + stride));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm_unpacklo_epi16(even, odd));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(packed) + 1, _mm_unpackhi_epi16(even, odd));
        continue;
      }
#endif
      __builtin_memcpy(packed, row, kTileRows * sizeof(E));
    }
  for (; k < K; k += kGroupSize)
    for (int i = 0; i < kTileRows; ++i)
      for (int g = 0; g < kGroupSize; ++g) *packed++ = i < count && k + g < K ? from[(k + g) * stride + i] : E{};
}

// sum[i] += all K elements of row i of such a tile. Chains of 32 that are then added up: one long chain has more than
// twice the error of PyTorch's pairwise sum.
template <class E>
void sum_tile_rows(const E* tile, int64_t K, double (&sum)[kTileRows]) {
  constexpr int64_t kShortChain = 32;
  for (int64_t first = 0; first < K; first += kShortChain) {
    double part[kTileRows] = {};
    for (int64_t k = first; k < smaller(K, first + kShortChain); k += kGroup<E>, tile += kTileStep<E>)
      for (int i = 0; i < kTileRows; ++i)
        for (int g = 0; g < kGroup<E>; ++g) part[i] += double(as<Accumulator<E>>(tile[i * kGroup<E> + g]));
    for (int i = 0; i < kTileRows; ++i) sum[i] += part[i];
  }
}

// Rows of a matrix; the elements of a row are contiguous.
template <class T>
struct Rows {
  T* first;
  int64_t stride;
  T* operator[](int64_t i) const { return first + i * stride; }
};

// Copies rows side by side for a product to read: as its operand type, and never a power of two apart. Rows 4096
// bytes apart share one set of the L1 cache, and a tile of 8 of them would fill it.
template <class E, class T, class Row>
Rows<const E> stage(E* to, int64_t stride, int64_t rows, int64_t columns, const Row& row) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* from = row(i);
    int64_t k = 0;
    if constexpr (kGroup<E> == 1)
      for (; from != nullptr && k + kLanes<E> <= columns; k += kLanes<E>) store(to + i * stride + k, load(from + k));
    for (; k < columns; ++k) to[i * stride + k] = from ? as<E>(from[k]) : E{};
  }
  return {to, stride};
}

template <class E>
int64_t staged_stride(int64_t columns) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(E));
  return ceil_div(columns, kLine) * kLine + kLine;
}

template <class E>
bool collides(int64_t stride) {
  return (stride * int64_t(sizeof(E))) % 4096 == 0 && stride != 0;
}

// A register of operands, `count` of them read and the others zero.
template <class E, class T, class Row>
GENKERNELS_INLINE void load_operands(const T* from, int64_t count, Row& to) {
  constexpr int64_t kElements = kVectorBytes / int64_t(sizeof(E));
  if (count < kElements) {
    E elements[kElements] = {};
    for (int64_t i = 0; i < count; ++i) elements[i] = as<E>(from[i]);
    __builtin_memcpy(&to, elements, sizeof to);
  } else if constexpr (__is_same(T, E)) {
    __builtin_memcpy(&to, from, sizeof to);
#if defined(__AVX512BF16__)
  } else if constexpr (__is_same(E, bfloat16)) {
    to = (Row)narrowed(from);
#endif
  } else {
    to = (Row)load(from);
  }
}

// Packs a panel of B^T: row(n) gives the address of row n of B [.., K], which becomes column n, or null for a column of
// zeros. A square of a register's columns by as many groups of k at a time, transposed in registers.
template <class E, class T, int kVectors, class Row>
void pack_panel_of_rows(int64_t K, const Row& row, E* to) {
  constexpr int64_t kGroupSize = kGroup<E>, kElements = kLanes<E> * kGroupSize, kStep = Panel<E, kVectors>::kStep;
  const int64_t groups = ceil_div(K, kGroupSize);
  for (int64_t v = 0; v < kVectors; ++v) {
    const T* rows[kLanes<E>];
    bool are_whole = true;
    for (int64_t n = 0; n < kLanes<E>; ++n) {
      rows[n] = row(v * kLanes<E> + n);
      are_whole &= rows[n] != nullptr;
    }
    int64_t k = 0;
    for (; are_whole && k + kElements <= K; k += kElements) {
      Square<LaneOf<sizeof(E) * kGroupSize>> square;
      static_assert(square.kRows == kLanes<E>);
#pragma GCC unroll 16
      for (int64_t n = 0; n < kLanes<E>; ++n) load_operands<E>(rows[n] + k, kElements, square.rows[n]);
      square.transpose();
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes<E>; ++i)
        __builtin_memcpy(to + (k / kGroupSize + i) * kStep + v * kElements, &square.rows[i], kVectorBytes);
    }
    for (; k < K; k += kElements) {
      Square<LaneOf<sizeof(E) * kGroupSize>> square;
#pragma GCC unroll 16
      for (int64_t n = 0; n < kLanes<E>; ++n)
        load_operands<E>(rows[n] ? rows[n] + k : nullptr, rows[n] ? smaller(kElements, K - k) : 0, square.rows[n]);
      square.transpose();
      const int64_t filled = smaller(kLanes<E>, groups - k / kGroupSize);
      for (int64_t i = 0; i < filled; ++i)
        __builtin_memcpy(to + (k / kGroupSize + i) * kStep + v * kElements, &square.rows[i], kVectorBytes);
    }
  }
}

// An operand of a product: groups of k are `step` elements apart.
template <class E>
struct Steps {
  const E* first;
  ptrdiff_t step;
};

// to[i][:] += tile[i][:] panel[:][:], or =, for `rows` rows of a tile of A^T and a panel of columns.
template <int kVectors, class E>
void add_tile(const Columns<E>& columns, int64_t p, Steps<E> panel, Steps<E> tile, int64_t K, int rows,
              Accumulator<E>* to, int64_t stride, bool is_first) {
  using A = Accumulator<E>;
  // PyTorch's sums over the rows are shorter: with chains of 256 the error exceeds twice theirs at 264 rows.
  constexpr int64_t kLongest = 128;
  // What the tile is added to lies further away than the operands, and arrives while it is multiplied.
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < kVectors; ++v) __builtin_prefetch(to + i * stride + columns.first_column(p) + v * kLanes<A>, 1);
  Vector<A> sum[kTileRows][kVectors];
  product<E, kTileRows, kVectors, kLongest>(tile.first, kGroup<E>, tile.step, panel.first, K, sum, panel.step);
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < kVectors; ++v) {
      const int64_t column = columns.first_column(p) + v * kLanes<A>;
      const int count = int(smaller(kLanes<A>, columns.count - column));
      A* at = to + i * stride + column;
      store(at, is_first ? sum[i][v] : load(at, count) + sum[i][v], count);
    }
}

// Calls finish(first, run, sum) with the product of rows [first, first + run) of `a` and a panel, for all `rows` of
// them. `next` is the panel to come, which is fetched into L2 meanwhile; and so are rows that were not read yet, if
// they lie one behind the other.
template <class E, int kVectors, class Finish>
GENKERNELS_INLINE void multiply_panel(Rows<const E> a, int64_t rows, const E* panel, int64_t K, const E* next,
                                      bool is_first, const Finish& finish) {
  const char* const ahead = reinterpret_cast<const char*>(next);
  const bool fetches_rows = is_first && a.stride == K;
  for (int64_t first = 0; first < rows; first += kRunRows) {
    const int64_t run = smaller(kRunRows, rows - first), part = first / kRunRows;
    Vector<Accumulator<E>> sum[kRunRows][kVectors];
    product_of_rows<E, kVectors>(
        a[first], a.stride, run, panel, K, sum,
        fetches_rows && part >= kVectors
            ? Ahead<Into::L2>{reinterpret_cast<const char*>(a[first + kRunRows]),
                              kRunRows * kGroup<E> * int64_t(sizeof(E))}
            : Ahead<Into::L2>{part < kVectors ? ahead + part * ceil_div(K, kGroup<E>) * kVectorBytes : ahead});
    finish(first, run, sum);
  }
}

// The right operand of a product by panels: packed, or columns of rows that are `row_stride` apart.
template <class E>
struct Panels {
  const E* first;
  int64_t row_stride = 0;  // 0 where they are packed

  template <int kVectors>
  Steps<E> panel(const Columns<E>& columns, int64_t p, int64_t K) const {
    if (row_stride == 0) return {first + columns.offset(p, K), Panel<E, kVectors>::kStep};
    return {first + columns.first_column(p), row_stride};
  }
};

// Whether the columns fill whole registers, and can be read as panels where they lie.
template <class E>
bool are_panels(const Columns<E>& columns, int64_t row_stride) {
  return kGroup<E> == 1 && columns.count % kLanes<E> == 0 && !collides<E>(row_stride);
}

// Tiles of A^T that stay in the L2 cache while the panels pass by.
constexpr int64_t kTileGroup = 16;
constexpr int64_t kFarApart = 8192;  // bytes from one row to the next

// to += A^T B, or =: columns [first, last) of A [K, ..] and panels [first_panel, last_panel) of B [K, columns]. `tiles`
// has room for kTileGroup tiles of K rows, of which those are packed that can't be read where they lie: pairs, the last
// one if it is not whole, and columns whose every element has a page or two of its own, which takes 3% of the time.
template <class E>
void add_transposed_product(Rows<const E> a, int64_t K, int64_t first, int64_t last, const Columns<E>& columns,
                            int64_t first_panel, int64_t last_panel, Panels<E> panels, E* tiles, Accumulator<E>* to,
                            int64_t stride, bool is_first) {
  const int64_t width = ceil_div(K, kGroup<E>) * kTileStep<E>;
  for (int64_t group = first; group < last; group += kTileGroup * kTileRows) {
    const int64_t end = smaller(last, group + kTileGroup * kTileRows);
    Steps<E> of_group[kTileGroup];
    for (int64_t n = group; n < end; n += kTileRows) {
      const int64_t index = (n - group) / kTileRows;
      if (kGroup<E> == 1 && n + kTileRows <= end && a.stride * int64_t(sizeof(E)) <= kFarApart) {
        of_group[index] = {a[0] + n, a.stride};
      } else {
        of_group[index] = {tiles + index * width, kTileStep<E>};
        pack_transposed<E>(a[0] + n, a.stride, K, smaller(kTileRows, end - n), tiles + index * width);
      }
    }
    for (int64_t p = first_panel; p < last_panel; ++p)
      columns.with_width(p, [&]<int kVectors>() {
        for (int64_t n = group; n < end; n += kTileRows)
          add_tile<kVectors>(columns, p, panels.template panel<kVectors>(columns, p, K),
                             of_group[(n - group) / kTileRows], K, int(smaller(kTileRows, end - n)), to + n * stride,
                             stride, is_first);
      });
  }
}

// sums[n] += sum_i value(i, n), or =, for columns [first, last) and `rows` rows; value(i, n) is a register that starts
// at column n. Chains of 32, that are then added up.
template <class A, class Value>
void add_columns(int64_t rows, int64_t first, int64_t last, const Value& value, double* sums, bool is_first) {
  constexpr int64_t kShortChain = 32;
  for (int64_t n = first; n < last; n += kLanes<A>) {
    double lanes[kLanes<A>] = {};
    for (int64_t start = 0; start < rows; start += kShortChain) {
      Vector<A> part = {};
      for (int64_t i = start; i < smaller(rows, start + kShortChain); ++i) part += value(i, n);
      for (int l = 0; l < kLanes<A>; ++l) lanes[l] += double(part[l]);
    }
    for (int64_t l = 0; l < smaller(kLanes<A>, last - n); ++l)
      sums[n + l] = is_first ? lanes[l] : sums[n + l] + lanes[l];
  }
}

// Sums as the type of the result.
template <class T>
void narrow(T* to, const Accumulator<T>* from, int64_t count) {
  using A = Accumulator<T>;
  for (int64_t k = 0; k < count; k += kLanes<A>) {
    const int lanes = int(smaller(kLanes<A>, count - k));
    store(to + k, load(from + k, lanes), lanes);
  }
}

}  // namespace genkernels::GENKERNELS_LEVEL
