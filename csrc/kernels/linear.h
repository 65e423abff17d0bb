// The linear map of a few rows, output = input weight^T + bias (torch.nn.functional.linear).
// Plain pointers and structs only: this header is what crosses from one SIMD level's code to another's.
#pragma once

#include "runtime.h"

namespace genkernels {

struct Linear {
  DType dtype;
  int64_t rows, in_features, out_features;
  const void* input;  // [rows, K]
  int64_t input_stride;
  const void* weight;  // [N, K]
  const void* bias;    // [N], or null
  void* output;        // [rows, N]
};

}  // namespace genkernels

#define GENKERNELS_DECLARE_LINEAR(level)                             \
  namespace genkernels::level {                                      \
  void linear_forward(const Linear& linear, const Runtime& runtime); \
  }
