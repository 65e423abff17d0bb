// One layer of recurrent cells over a sequence, in one direction: what every cell is called with.
// Plain pointers and structs only: this header is what crosses from one SIMD level's code to another's.
#pragma once

#include "runtime.h"

namespace genkernels {

// A sequence is T steps of `batch` rows. With batch_sizes (a packed sequence, longest row first) step t has the first
// batch_sizes[t] rows, and rows of all steps lie one after another in input, output and gates. A weight has a block of
// H rows for each gate of the cell (G).
struct Recurrent {
  DType dtype;
  bool reverse;
  int64_t steps, batch, input_size, hidden_size;
  const int64_t* batch_sizes;  // [T], or null
  const bool* resets;          // [T, B], or null: where true, h is zero before the step
  const void* input;           // [T, B, I] or [sum(batch_sizes), I]
  int64_t input_stride_t, input_stride_b;
  const void* hx;                     // [B, H]
  const void *weight_ih, *weight_hh;  // [G H, I], [G H, H]
  const void *bias_ih, *bias_hh;      // [G H], or both null
  void* output;                       // [T, B, H] or [sum(batch_sizes), H]
  void* h_n;                          // [B, H], each row's state after its last step, or null
  void* gates;                        // what the cell saves beside output for the backward pass, or null
  const void* packed;                 // the weights and biases packed before the call, or null
};

struct RecurrentGradients {
  const void* grad_output;  // as output, or null
  int64_t grad_output_stride_t, grad_output_stride_b;
  const void* grad_h_n;                   // [B, H], or null
  void* grad_input;                       // [T, B, I] or [sum(batch_sizes), I], or null
  void* grad_hx;                          // [B, H]
  void* grad_states;                      // gradient of the state after each step, as output, or null
  bool needs_weights;                     // whether the weights' and biases' gradients are wanted
  void *grad_weight_ih, *grad_weight_hh;  // [G H, I], [G H, H]
  void *grad_bias_ih, *grad_bias_hh;      // [G H], or null if there are no biases
};

}  // namespace genkernels
