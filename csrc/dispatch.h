// Chooses the SIMD level that kernels run at.
#pragma once

#include "kernels/attention.h"
#include "kernels/dropout.h"
#include "kernels/gru.h"
#include "kernels/linear.h"
#include "kernels/linear_cross_entropy.h"
#include "kernels/rnn.h"

GENKERNELS_DECLARE_ATTENTION(baseline)
GENKERNELS_DECLARE_DROPOUT(baseline)
GENKERNELS_DECLARE_GRU(baseline)
GENKERNELS_DECLARE_LINEAR(baseline)
GENKERNELS_DECLARE_LINEAR_CROSS_ENTROPY(baseline)
GENKERNELS_DECLARE_RNN(baseline)

namespace genkernels {

// The kernels of one level.
struct Kernels {
  const char* level;
  bool (*is_supported)();
  decltype(&baseline::attention_forward) attention_forward;
  decltype(&baseline::attention_backward) attention_backward;
  decltype(&baseline::attention_double_backward) attention_double_backward;
  decltype(&baseline::dropout) dropout;
  decltype(&baseline::gru_packed_size) gru_packed_size;
  decltype(&baseline::gru_pack) gru_pack;
  decltype(&baseline::gru_forward) gru_forward;
  decltype(&baseline::gru_backward) gru_backward;
  decltype(&baseline::linear_forward) linear_forward;
  decltype(&baseline::linear_backward) linear_backward;
  decltype(&baseline::linear_cross_entropy) linear_cross_entropy;
  decltype(&baseline::rnn_forward) rnn_forward;
  decltype(&baseline::rnn_backward) rnn_backward;
};

// The levels of this build, lowest first, ended by one without a name.
const Kernels* built_levels();

// Those of them that this CPU has, lowest first, ended by null.
const Kernels* const* supported_levels();

// The level in use: the highest supported one, unless select_level() chose another.
const Kernels& kernels();

// Returns false, and changes nothing, if this CPU or this build lacks the level.
bool select_level(const char* level);

// Whether the CPU is of Intel's make, which MKL, the library of PyTorch's products, asks for its fastest code.
bool is_intel();

}  // namespace genkernels
