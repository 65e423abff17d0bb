// What a kernel asks of its caller, so that kernels know neither PyTorch nor a thread library.
#pragma once

#include <cstddef>
#include <cstdint>

namespace genkernels {

enum class DType { float32, float64, bfloat16 };

struct Runtime {
  int threads;
  // Runs task(argument, i) once for each i in [0, count), on at most `threads` threads, and returns when all are done.
  void (*parallel)(int64_t count, void (*task)(void* argument, int64_t i), void* argument);
  // Memory for the duration of the call, 64-byte aligned, uninitialised.
  void* (*allocate)(void* owner, size_t bytes);
  void* owner;
};

}  // namespace genkernels
