// The matrix product for so few rows that the right operand, a weight [N, K], is read as it lies in memory.
#pragma once

#include "gemm.h"

namespace genkernels::GENKERNELS_LEVEL {

// sums[i][u] += x[i][k..] w[u][k..], element by element, for as many k as a register holds.
template <class T, int kRows, int kUnits>
GENKERNELS_INLINE int64_t multiply_columns(const T* const* x, const T* const (&w)[kUnits], int64_t K,
                                           Vector<Accumulator<T>> (&sums)[kRows * kUnits]) {
  using A = Accumulator<T>;
  int64_t k = 0;
#if defined(__AVX512BF16__)
  if constexpr (__is_same(T, bfloat16)) {
    for (; k + 2 * kLanes<A> <= K; k += 2 * kLanes<A>) {
      const auto pairs = [k](const T* row) { return (__m512bh)_mm512_loadu_si512(row + k); };
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
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) sums[i * kUnits + u] += column[i] * row;
    }
  }
  return k;
}

// to[i][u] = x[i] w[u] for kRows rows x and `units` neighbouring rows of a weight as it lies in memory, at most a
// register of sums at a time: what packing would cost is more than what adding up their lanes does.
template <class T, int kRows>
void multiply_units(const T* weight, int64_t K, int64_t units, const T* const* x, Accumulator<T>* to, int64_t stride) {
  using A = Accumulator<T>;
  constexpr int kUnits = kLanes<A> / kRows;
  constexpr int64_t kLongest = kChain * kLanes<A>;  // each lane is a chain of its own
  for (int64_t first = 0; first < units; first += kUnits) {
    const T* w[kUnits];
    for (int u = 0; u < kUnits; ++u) w[u] = weight + smaller(first + u, units - 1) * K;
    Vector<A> totals = {};
    for (int64_t start = 0; start < K; start += kLongest) {
      const int64_t length = smaller(kLongest, K - start);
      const T *columns[kRows], *rows[kUnits];
      for (int i = 0; i < kRows; ++i) columns[i] = x[i] + start;
      for (int u = 0; u < kUnits; ++u) rows[u] = w[u] + start;
      Vector<A> sums[kRows * kUnits] = {};
      for (int64_t k = multiply_columns<T, kRows, kUnits>(columns, rows, length, sums); k < length; k += kLanes<A>) {
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

template <class T, int kRows = int(smaller(4, kLanes<Accumulator<T>>))>
void multiply_units_of_rows(const T* weight, int64_t K, int64_t units, const T* const* x, int64_t rows,
                            Accumulator<T>* to, int64_t stride) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) multiply_units<T, kRows>(weight, K, units, x + i, to + i * stride, stride);
  if constexpr (kRows > 1)
    multiply_units_of_rows<T, kRows / 2>(weight, K, units, x + i, rows - i, to + i * stride, stride);
}

}  // namespace genkernels::GENKERNELS_LEVEL
