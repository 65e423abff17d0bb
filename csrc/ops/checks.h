// Checks that keep a raw op call from reading or writing out of bounds. genkernels/ops checks the same in Python, where
// the fake kernels and the reference share it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "../kernels/dropout.h"
#include "../kernels/runtime.h"

namespace genkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Sizes>
std::string shape_string(const Sizes& sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

inline void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected) {
  const auto sizes = tensor.sizes();
  bool same = sizes.size() == expected.size();
  for (size_t i = 0; same && i < sizes.size(); ++i) same = sizes[i] == expected.begin()[i];
  STD_TORCH_CHECK(same, name, ": expected shape ", shape_string(expected), ", got ", shape_string(sizes));
}

inline void check_like(const char* name, const Tensor& tensor, const Tensor& input) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == input.scalar_type(), name,
                  ": expected a CPU tensor of input's dtype");
}

// float16 is attention's and dropout's alone.
inline DType dtype_of(const Tensor& input, bool takes_float16 = false) {
  switch (input.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half:
      if (takes_float16) return DType::float16;
      [[fallthrough]];
    default:
      STD_TORCH_CHECK(false, "input: expected dtype float32, float64", takes_float16 ? ", float16" : "",
                      " or bfloat16");
  }
}

// Of a probability in [0, 1].
inline Dropout dropout_of(double p, const Tensor& seed) {
  STD_TORCH_CHECK(seed.is_cpu() && seed.scalar_type() == ScalarType::Long && seed.numel() == 1,
                  "seed: expected a CPU tensor of one int64");
  return {uint64_t(p * 4294967296.0), uint64_t(*static_cast<const int64_t*>(seed.const_data_ptr())),
          p < 1 ? 1 / (1 - p) : 0};
}

// A contiguous tensor, copied only if it is not. It is asked first because calling PyTorch's contiguous() looks that up
// by name.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> as_contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(as_contiguous(*tensor)) : std::nullopt;
}

inline const void* data(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

// A tensor whose rows are contiguous, copied only if its own are not.
inline Tensor with_contiguous_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace genkernels
