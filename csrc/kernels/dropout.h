// Dropout (torch.nn.functional.dropout), and its sum with a residual. What it drops of the input, its gradient drops of
// the output's.
// Plain pointers and structs only: this header is what crosses from one SIMD level's code to another's.
#pragma once

#include "runtime.h"

namespace genkernels {

// An element is kept where its random number of 32 bits is at least `threshold`.
struct Dropout {
  uint64_t threshold;  // 0: no dropout; 2^32: nothing is kept
  uint64_t seed;
  double scale;  // of what is kept
};

struct DropoutForward {
  DType dtype;
  int64_t size;  // elements of each
  const void* input;
  const void* residual;  // what is added, or null
  void* output;
  Dropout of;
};

}  // namespace genkernels

#define GENKERNELS_DECLARE_DROPOUT(level)                                \
  namespace genkernels::level {                                          \
  void dropout(const DropoutForward& arguments, const Runtime& runtime); \
  }
