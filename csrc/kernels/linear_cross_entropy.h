// The softmax cross-entropy of a linear map (torch.nn.functional.linear_cross_entropy), whose logits exist for one
// block of rows at a time.
// Plain pointers and structs only: this header is what crosses from one SIMD level's code to another's.
#pragma once

#include "runtime.h"

namespace genkernels {

enum class Reduction { none, mean, sum };

struct LinearCrossEntropy {
  DType dtype;
  int64_t rows, in_features, classes;
  const void* input;  // [N, K]
  int64_t input_stride;
  const void* linear_weight;  // [V, K]
  const void* linear_bias;    // [V], or null
  const int64_t* target;      // [N], each in [0, V) or ignore_index
  const void* weight;         // of the classes, [V], in the type that sums are kept in, or null
  int64_t ignore_index;
  double label_smoothing;
  Reduction reduction;

  // Losses and their gradients are of the type that sums are kept in: float32 for bfloat16.
  void* loss;            // [N], or one element
  int64_t* predictions;  // [N] the most likely class, or null

  const void* grad_loss;     // [N] or one element, or null: ones
  void* grad_input;          // [N, K], or null
  void* grad_linear_weight;  // [V, K], or null
  void* grad_linear_bias;    // [V], or null
};

}  // namespace genkernels

#define GENKERNELS_DECLARE_LINEAR_CROSS_ENTROPY(level)                                    \
  namespace genkernels::level {                                                           \
  void linear_cross_entropy(const LinearCrossEntropy& arguments, const Runtime& runtime); \
  }
