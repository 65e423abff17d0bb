// The linear map output = activation(input weight^T + bias) (torch.nn.functional.linear) and its gradient.
// Plain pointers and structs only: this header is what crosses from one SIMD level's code to another's.
#pragma once

#include "runtime.h"

namespace genkernels {

enum class Activation { none, relu, gelu, gelu_tanh, silu };

struct Linear {
  DType dtype;
  DType weight_dtype;  // of weight and bias: dtype, or float32 beside bfloat16
  int64_t rows, in_features, out_features;
  const void* input;  // [M, K]
  int64_t input_stride;
  const void* weight;  // [N, K]
  const void* bias;    // [N], or null
  Activation activation;
  void* output;          // [M, N]
  void* pre_activation;  // [M, N] what the activation is taken of, or null
};

struct LinearBackward {
  DType dtype;
  DType weight_dtype;  // of weight, grad_weight and grad_bias
  int64_t rows, in_features, out_features;
  const void* input;  // [M, K], for grad_weight
  int64_t input_stride;
  const void* weight;  // [N, K], for grad_input
  Activation activation;
  const void* saved;        // [M, N] what the activation is taken of; for relu the output; null without activation
  const void* grad_output;  // [M, N]
  int64_t grad_output_stride;

  void* grad_input;   // [M, K], or null
  void* grad_weight;  // [N, K], or null
  void* grad_bias;    // [N], or null
};

}  // namespace genkernels

#define GENKERNELS_DECLARE_LINEAR(level)                                      \
  namespace genkernels::level {                                               \
  void linear_forward(const Linear& linear, const Runtime& runtime);          \
  void linear_backward(const LinearBackward& linear, const Runtime& runtime); \
  }
