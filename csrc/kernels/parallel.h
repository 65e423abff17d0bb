// The caller's threads and memory in the shape kernels use them.
#pragma once

#include "runtime.h"
#include "simd.h"

namespace genkernels::GENKERNELS_LEVEL {

template <class S>
S* allocate(const Runtime& runtime, int64_t count) {
  return static_cast<S*>(runtime.allocate(runtime.owner, size_t(count) * sizeof(S)));
}

// body(first, last) over ranges that cover [0, count), all at the same time.
template <class Body>
void parallel_ranges(const Runtime& runtime, int64_t count, const Body& body) {
  if (count == 1) return body(0, 1);
  runtime.parallel(
      count, [](void* argument, int64_t first, int64_t last) { (*static_cast<const Body*>(argument))(first, last); },
      const_cast<Body*>(&body));
}

// body(i) for each i in [0, count).
template <class Body>
void parallel(const Runtime& runtime, int64_t count, const Body& body) {
  parallel_ranges(runtime, count, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(i);
  });
}

// Where the ranges of one parallel_ranges wait for each other. Members are counted, not threads: in a nested region or
// under a thread limit one range has several members, or all of them, and then does not wait.
class Barrier {
 public:
  Barrier(const Runtime& runtime, int64_t members)
      : runtime_(runtime), members_(members), arrived_(allocate<int64_t>(runtime, 1)) {
    restart();
  }

  // Before members meet in another parallel_ranges, whose ranges may be others.
  void restart() const { *arrived_ = 0; }

  // Returns when all members have arrived `round` times, this range's `count` members now for the round-th time.
  void wait(int64_t count, int64_t round) const {
    if (count == members_) return;
    __atomic_add_fetch(arrived_, count, __ATOMIC_ACQ_REL);
    // A meeting takes a tenth of a microsecond. Where there are more threads than cores, the one waited for may have
    // none: then the core is given away.
    for (int spins = 0; __atomic_load_n(arrived_, __ATOMIC_ACQUIRE) < round * members_; ++spins)
      if (spins < 10000)
        pause();
      else
        runtime_.yield();
  }

 private:
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  const Runtime& runtime_;
  int64_t members_;
  int64_t* arrived_;
};

}  // namespace genkernels::GENKERNELS_LEVEL
