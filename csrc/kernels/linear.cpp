#include "linear.h"

#include "gemv.h"
#include "parallel.h"

GENKERNELS_DECLARE_LINEAR(GENKERNELS_LEVEL)

namespace genkernels::GENKERNELS_LEVEL {
namespace {

// Rows that are multiplied with a block of outputs while its part of the weight is in the cache.
constexpr int64_t kRowsTogether = 32;

// Outputs [first, last) of every row, a register of them at a time.
template <class T>
void forward_outputs(const Linear& linear, int64_t first, int64_t last) {
  using A = Accumulator<T>;
  constexpr int kUnits = kLanes<A>;
  const int64_t K = linear.in_features, N = linear.out_features;
  const T* bias = static_cast<const T*>(linear.bias);
  for (int64_t n = first; n < last; n += kUnits) {
    const int count = int(smaller(kUnits, last - n));
    const Vector<A> added = bias ? load(bias + n, count) : Vector<A>{};
    for (int64_t run = 0; run < linear.rows; run += kRowsTogether) {
      const int64_t rows = smaller(kRowsTogether, linear.rows - run);
      const T* input[kRowsTogether];
      for (int64_t i = 0; i < rows; ++i)
        input[i] = static_cast<const T*>(linear.input) + (run + i) * linear.input_stride;
      A sums[kRowsTogether][kUnits];
      multiply_units_of_rows(static_cast<const T*>(linear.weight) + n * K, K, count, input, rows, sums[0], kUnits);
      T* output = static_cast<T*>(linear.output) + run * N + n;
      for (int64_t i = 0; i < rows; ++i) store(output + i * N, load(sums[i]) + added, count);
    }
  }
}

// Each thread reads a part of the weight from its first element to its last: that is what the call costs.
template <class T>
void forward(const Linear& linear, const Runtime& runtime) {
  constexpr int kUnits = kLanes<Accumulator<T>>;
  const int64_t N = linear.out_features, blocks = ceil_div(N, kUnits), shares = smaller(runtime.threads, blocks);
  parallel(runtime, shares, [&](int64_t i) {
    forward_outputs<T>(linear, blocks * i / shares * kUnits, smaller(N, blocks * (i + 1) / shares * kUnits));
  });
}

}  // namespace

void linear_forward(const Linear& linear, const Runtime& runtime) {
  switch (linear.dtype) {
    case DType::float32: return forward<float>(linear, runtime);
    case DType::float64: return forward<double>(linear, runtime);
    case DType::bfloat16: return forward<bfloat16>(linear, runtime);
  }
}

}  // namespace genkernels::GENKERNELS_LEVEL
