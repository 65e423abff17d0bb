// What a kernel asks of its caller, so that kernels know neither PyTorch nor a thread library.
#pragma once

#include <cstddef>
#include <cstdint>

namespace genkernels {

enum class DType { float32, float64, bfloat16, float16 };

struct Runtime {
  int threads;
  int64_t cache;  // bytes of the cache that each core has to itself
  // Runs task(argument, first, last) over ranges that cover [0, count) once, count <= threads, and returns when all are
  // done. The ranges run at the same time, each on a thread of its own, so that they may wait for each other.
  void (*parallel)(int64_t count, void (*task)(void* argument, int64_t first, int64_t last), void* argument);
  // Lets another thread have this core.
  void (*yield)();
  // Memory until release() or the end of the call, 64-byte aligned, uninitialised.
  void* (*allocate)(void* owner, size_t bytes);
  void (*release)(void* owner);
  void* owner;
};

}  // namespace genkernels
