// New tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>

namespace genkernels {

// An uninitialised tensor of input's dtype. Not PyTorch's new_empty, which looks itself up by name at every call.
torch::stable::Tensor new_tensor(const torch::stable::Tensor& input, std::initializer_list<int64_t> sizes);

// The same in memory that is kept when it is freed: for gradients and for what one op saves for another. Not for
// outputs: its storage cannot be resized.
torch::stable::Tensor new_kept(const torch::stable::Tensor& input, std::initializer_list<int64_t> sizes);

}  // namespace genkernels
