// New tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

namespace genkernels {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// An uninitialised tensor of input's dtype. Not PyTorch's new_empty, which looks itself up by name at every call.
torch::stable::Tensor new_tensor(const torch::stable::Tensor& input, Sizes sizes);

// The same of the dtype that sums of input's are kept in: float32 for bfloat16 and float16.
torch::stable::Tensor new_accumulator(const torch::stable::Tensor& input, Sizes sizes);
torch::headeronly::ScalarType accumulator_dtype(const torch::stable::Tensor& input);

// The same in memory that is kept when it is freed: for gradients and for what one op saves for another. Not for
// outputs: its storage cannot be resized.
torch::stable::Tensor new_kept(const torch::stable::Tensor& input, Sizes sizes, bool is_accumulator = false);

}  // namespace genkernels
