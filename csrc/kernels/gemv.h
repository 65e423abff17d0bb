// The matrix product for so few rows that the right operand, a weight or its transpose, is read as it lies in memory.
#pragma once

#include "gemm.h"

namespace genkernels::GENKERNELS_LEVEL {

// Where rows come from memory, each load fetches what lies kAhead elements further: computing and waiting would
// otherwise take turns. 0 for those of a cache.
template <int64_t kAhead, class T>
GENKERNELS_INLINE void fetch_ahead(const T* at) {
  if constexpr (kAhead > 0) __builtin_prefetch(at + kAhead);
}

// sums[i][u] += x[i][k..] w[u][k..], element by element, for as many k as a register holds.
template <int64_t kAhead, class T, int kRows, int kUnits>
GENKERNELS_INLINE int64_t multiply_columns(const T* const* x, const T* const (&w)[kUnits], int64_t K,
                                           Vector<Accumulator<T>> (&sums)[kRows * kUnits]) {
  using A = Accumulator<T>;
  int64_t k = 0;
#if defined(__AVX512BF16__)
  if constexpr (__is_same(T, bfloat16)) {
    for (; k + 2 * kLanes<A> <= K; k += 2 * kLanes<A>) {
      const auto pairs = [k](const T* row) { return (__m512bh)_mm512_loadu_si512(row + k); };
      for (int u = 0; u < kUnits; ++u) fetch_ahead<kAhead>(w[u] + k);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
        for (int u = 0; u < kUnits; ++u)
          sums[i * kUnits + u] = (Vector<A>)_mm512_dpbf16_ps((__m512)sums[i * kUnits + u], pairs(x[i]), pairs(w[u]));
    }
    return k;
  }
#endif
  for (; k + kLanes<A> <= K; k += kLanes<A>) {
    Vector<A> column[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) column[i] = load(x[i] + k);
#pragma GCC unroll 16
    for (int u = 0; u < kUnits; ++u) {
      const Vector<A> row = load(w[u] + k);
      fetch_ahead<kAhead>(w[u] + k);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) sums[i * kUnits + u] += column[i] * row;
    }
  }
  return k;
}

// to[i][u] = x[i] w[u] for kRows rows x and `units` rows of a weight as it lies in memory, w_stride elements apart, at
// most a register of sums at a time: what packing would cost is more than what adding up their lanes does. As many
// units are written, rounded up to a multiple of kUnits.
template <int64_t kAhead, class T, int kRows>
void multiply_units(const T* weight, int64_t w_stride, int64_t K, int64_t units, const T* const* x, Accumulator<T>* to,
                    int64_t stride) {
  using A = Accumulator<T>;
  constexpr int kUnits = kLanes<A> / kRows;
  constexpr int64_t kLongest = kChain * kLanes<A>;  // each lane is a chain of its own
  for (int64_t first = 0; first < units; first += kUnits) {
    const T* w[kUnits];
    for (int u = 0; u < kUnits; ++u) w[u] = weight + smaller(first + u, units - 1) * w_stride;
    Vector<A> totals = {};
    for (int64_t start = 0; start < K; start += kLongest) {
      const int64_t length = smaller(kLongest, K - start);
      const T *columns[kRows], *rows[kUnits];
      for (int i = 0; i < kRows; ++i) columns[i] = x[i] + start;
      for (int u = 0; u < kUnits; ++u) rows[u] = w[u] + start;
      Vector<A> sums[kRows * kUnits] = {};
      for (int64_t k = multiply_columns<kAhead, T, kRows, kUnits>(columns, rows, length, sums); k < length;
           k += kLanes<A>) {
        const int count = int(smaller(kLanes<A>, length - k));
        for (int i = 0; i < kRows; ++i) {
          const Vector<A> column = load(columns[i] + k, count);
          for (int u = 0; u < kUnits; ++u) sums[i * kUnits + u] += column * load(rows[u] + k, count);
        }
      }
      totals += sums_of_lanes<A>(sums);
    }
    A total[kRows * kUnits];
    store(total, totals);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) __builtin_memcpy(to + i * stride + first, total + i * kUnits, kUnits * sizeof(A));
  }
}

template <int64_t kAhead = 0, class T, int kRows = int(smaller(4, kLanes<Accumulator<T>>))>
void multiply_units_of_rows(const T* weight, int64_t w_stride, int64_t K, int64_t units, const T* const* x,
                            int64_t rows, Accumulator<T>* to, int64_t stride) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows)
    multiply_units<kAhead, T, kRows>(weight, w_stride, K, units, x + i, to + i * stride, stride);
  if constexpr (kRows > 1)
    multiply_units_of_rows<kAhead, T, kRows / 2>(weight, w_stride, K, units, x + i, rows - i, to + i * stride, stride);
}

// sums[i][v] += a[i][k] b[k][v] for kRows rows and kTogether neighbouring k. Row k of b begins at b + k * N, a row of
// sums has `stride` elements, and of b's last vector `last` columns are read.
template <int64_t kAhead, class T, int kRows, int kTogether>
GENKERNELS_INLINE void add_rows_of_weight(const Accumulator<T>* a, int64_t a_stride, const T* b, int64_t N,
                                          int64_t vectors, int last, Accumulator<T>* sums, int64_t stride) {
  using A = Accumulator<T>;
  Vector<A> factor[kRows][kTogether];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int k = 0; k < kTogether; ++k) factor[i][k] = broadcast(a[i * a_stride + k]);
  const auto add = [&](int64_t v, const auto& load_row) GENKERNELS_LAMBDA {
    Vector<A> row[kTogether];
#pragma GCC unroll 4
    for (int k = 0; k < kTogether; ++k) {
      row[k] = load_row(b + k * N + v * kLanes<A>);
      fetch_ahead<kAhead>(b + k * N + v * kLanes<A>);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      A* at = sums + i * stride + v * kLanes<A>;
      Vector<A> sum = load(at);
#pragma GCC unroll 4
      for (int k = 0; k < kTogether; ++k) sum += factor[i][k] * row[k];
      store(at, sum);
    }
  };
  for (int64_t v = 0; v + 1 < vectors; ++v) add(v, [](const T* from) GENKERNELS_LAMBDA { return load(from); });
  add(vectors - 1, [last](const T* from) GENKERNELS_LAMBDA { return load(from, last); });
}

// to[i][n] += a[i][:] b[:][n] for `rows` rows and `count` columns. The rows of b lie N elements apart, as those of a
// weight [K, N]; each is read once, from its first column to its last, which is how memory is read fastest.
template <int64_t kAhead = 0, class T>
void multiply_as_it_lies(const Accumulator<T>* a, int64_t a_stride, int64_t rows, const T* b, int64_t N, int64_t K,
                         int64_t count, Accumulator<T>* to, int64_t stride) {
  using A = Accumulator<T>;
  constexpr int kTogether = 4, kRows = kVectorBytes == 64 ? 4 : 2;
  constexpr int64_t kSums = 256 * kLanes<A>;  // that stay in the L1 cache beside the rows of b
  A sums[kSums];
  const int64_t most = larger(1, kSums / kLanes<A> / larger(1, rows)) * kLanes<A>;
  for (int64_t n = 0; n < count; n += most) {
    const int64_t vectors = ceil_div(smaller(most, count - n), kLanes<A>), width = vectors * kLanes<A>;
    const int last = int(smaller(kLanes<A>, count - n - width + kLanes<A>));
    for (int64_t first = 0; first < K; first += kChain) {
      __builtin_memset(sums, 0, size_t(rows * width) * sizeof(A));
      const auto add = [&]<int kCount>(int64_t k) {
        for_row_tiles<kRows>(rows, [&]<int kTile>(int64_t i) {
          add_rows_of_weight<kAhead, T, kTile, kCount>(a + i * a_stride + k, a_stride, b + k * N + n, N, vectors, last,
                                                       sums + i * width, width);
        });
      };
      const int64_t end = smaller(K, first + kChain);
      int64_t k = first;
      for (; k + kTogether <= end; k += kTogether) add.template operator()<kTogether>(k);
      for (; k < end; ++k) add.template operator()<1>(k);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t v = 0; v < vectors; ++v) {
          const int lanes = v + 1 < vectors ? kLanes<A> : last;
          A* at = to + i * stride + n + v * kLanes<A>;
          store(at, load(at, lanes) + load(sums + i * width + v * kLanes<A>), lanes);
        }
    }
  }
}

}  // namespace genkernels::GENKERNELS_LEVEL
