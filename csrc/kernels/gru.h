// Gated recurrent unit over a sequence, one layer, one or two directions, in PyTorch's formulation (torch.nn.GRU):
//   r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)      z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
//   n = tanh(W_in x + b_in + r (W_hn h + b_hn))     h' = (1 - z) n + z h
// The gates of a weight are r, z, n. Saved are r, z, n, W_hn h + b_hn of each row, [.., 4, H]; where nothing is, the
// backward pass computes them anew. packed: what gru_pack() made of the weights and biases.
#pragma once

#include "recurrent.h"

// One or two directions (`gru` and `grad` have as many), of the same dtype, sizes and batch_sizes.
#define GENKERNELS_DECLARE_GRU(level)                                                                                  \
  namespace genkernels::level {                                                                                        \
  int64_t gru_packed_size(const Recurrent& gru);                                                                       \
  void gru_pack(const Recurrent& gru, void* packed, const Runtime& runtime);                                           \
  void gru_forward(const Recurrent* gru, int64_t directions, const Runtime& runtime);                                  \
  void gru_backward(const Recurrent* gru, const RecurrentGradients* grad, int64_t directions, const Runtime& runtime); \
  }
