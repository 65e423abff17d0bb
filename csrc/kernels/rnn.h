// Elman's recurrent unit over a sequence, one layer, one or two directions, in PyTorch's formulation (torch.nn.RNN):
//   h' = tanh(W_ih x + b_ih + W_hh h + b_hh)
// Nothing is saved but the states: the derivative of tanh is 1 - h'^2.
#pragma once

#include "recurrent.h"

// One or two directions (`rnn` and `grad` have as many), of the same dtype, sizes and batch_sizes.
#define GENKERNELS_DECLARE_RNN(level)                                                                                  \
  namespace genkernels::level {                                                                                        \
  void rnn_forward(const Recurrent* rnn, int64_t directions, const Runtime& runtime);                                  \
  void rnn_backward(const Recurrent* rnn, const RecurrentGradients* grad, int64_t directions, const Runtime& runtime); \
  }
