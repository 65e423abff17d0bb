// Gated recurrent unit over a sequence, one layer, one or two directions, in PyTorch's formulation (torch.nn.GRU):
//   r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)      z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
//   n = tanh(W_in x + b_in + r (W_hn h + b_hn))     h' = (1 - z) n + z h
// Plain pointers and structs only: this header is what crosses from one SIMD level's code to another's.
#pragma once

#include "runtime.h"

namespace genkernels {

// A sequence is T steps of `batch` rows. With batch_sizes (a packed sequence, longest row first) step t has the first
// batch_sizes[t] rows, and rows of all steps lie one after another in input, output and gates.
struct Gru {
  DType dtype;
  bool reverse;
  int64_t steps, batch, input_size, hidden_size;
  const int64_t* batch_sizes;  // [T], or null
  const bool* resets;          // [T, B], or null: where true, h is zero before the step
  const void* input;           // [T, B, I] or [sum(batch_sizes), I]
  int64_t input_stride_t, input_stride_b;
  const void* hx;                     // [B, H]
  const void *weight_ih, *weight_hh;  // [3H, I], [3H, H], gates r, z, n
  const void *bias_ih, *bias_hh;      // [3H], or both null
  void* output;                       // [T, B, H] or [sum(batch_sizes), H]
  void* h_n;                          // [B, H], each row's state after its last step, or null
  // r, z, n, W_hn h + b_hn of each row: [.., 4, H]. Null if nothing is saved; the backward pass then computes them
  // anew.
  void* gates;
  const void* packed;  // what gru_pack() made of the weights and biases, or null
};

struct GruGradients {
  const void* grad_output;  // as output, or null
  int64_t grad_output_stride_t, grad_output_stride_b;
  const void* grad_h_n;                   // [B, H], or null
  void* grad_input;                       // [T, B, I] or [sum(batch_sizes), I], or null
  void* grad_hx;                          // [B, H]
  void* grad_states;                      // gradient of the state after each step, as output, or null
  bool needs_weights;                     // whether the weights' and biases' gradients are wanted
  void *grad_weight_ih, *grad_weight_hh;  // [3H, I], [3H, H]
  void *grad_bias_ih, *grad_bias_hh;      // [3H], or null if there are no biases
};

}  // namespace genkernels

// One or two directions (`gru` and `grad` have as many), of the same dtype, sizes and batch_sizes.
#define GENKERNELS_DECLARE_GRU(level)                                                                      \
  namespace genkernels::level {                                                                            \
  int64_t gru_packed_size(const Gru& gru);                                                                 \
  void gru_pack(const Gru& gru, void* packed, const Runtime& runtime);                                     \
  void gru_forward(const Gru* gru, int64_t directions, const Runtime& runtime);                            \
  void gru_backward(const Gru* gru, const GruGradients* grad, int64_t directions, const Runtime& runtime); \
  }
