#include "dropout.h"

#include "parallel.h"
#include "random.h"

namespace genkernels::GENKERNELS_LEVEL {
namespace {

template <class T>
struct Elements {
  using A = Accumulator<T>;

  const T* input;
  const T* residual;
  T* output;
  Dropout of;

  // Those from kRandomKeys * group on, which have the numbers of that group of one row of keys, in counters of 64 bits.
  GENKERNELS_INLINE void drop(int64_t group, int64_t count) const {
    uint32_t numbers[kRandomKeys];
    random_keys(of.seed, 0, uint32_t(group >> 28), uint32_t(group), numbers);
    const auto least = LaneOf<sizeof(A)>(uint32_t(of.threshold));  // where it is 2^32, the scale is 0
    const Vector<A> scale = broadcast(A(of.scale));
    for (int64_t n = 0; n < count; n += kLanes<A>) {
      const int64_t at = group * kRandomKeys + n;
      const int some = int(smaller(kLanes<A>, count - n));
      // A product with zero, as PyTorch's: what is dropped of an infinity is NaN.
      const Vector<A> factor = load_numbers<A>(numbers + n) >= least ? scale : Vector<A>{};
      Vector<A> x = rounded(load(input + at, some) * factor);  // as without a residual
      if (residual != nullptr) x = load(residual + at, some) + x;
      store(output + at, x, some);
    }
  }
};

template <class T>
void run(const DropoutForward& arguments, const Runtime& runtime) {
  const Elements<T> elements{static_cast<const T*>(arguments.input), static_cast<const T*>(arguments.residual),
                             static_cast<T*>(arguments.output), arguments.of};
  const int64_t whole = arguments.size / kRandomKeys, groups = ceil_div(arguments.size, kRandomKeys);
  const int64_t ranges = smaller(runtime.threads, groups);
  parallel_ranges(runtime, ranges, [&](int64_t first, int64_t last) {
    const int64_t end = groups * last / ranges;
    for (int64_t group = groups * first / ranges; group < smaller(whole, end); ++group)
      elements.drop(group, kRandomKeys);
    if (end > whole) elements.drop(whole, arguments.size % kRandomKeys);
  });
}

}  // namespace

void dropout(const DropoutForward& arguments, const Runtime& runtime) {
  switch (arguments.dtype) {
    case DType::float32: return run<float>(arguments, runtime);
    case DType::float64: return run<double>(arguments, runtime);
    case DType::bfloat16: return run<bfloat16>(arguments, runtime);
    case DType::float16: return run<float16>(arguments, runtime);
  }
}

}  // namespace genkernels::GENKERNELS_LEVEL
