// genkernels::linear_forward. Schema and meaning: genkernels/ops/linear.py.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../dispatch.h"
#include "checks.h"
#include "runtime.h"
#include "stats.h"
#include "tensors.h"

namespace genkernels {
namespace {

CallCounter forward_calls("linear_forward");

Tensor linear_forward(Tensor input_, Tensor weight_, std::optional<Tensor> bias_) {
  STD_TORCH_CHECK(input_.dim() > 0, "input: expected at least 1 dimension");
  STD_TORCH_CHECK(weight_.dim() == 2, "weight: expected 2 dimensions, got ", weight_.dim());
  const int64_t last = input_.dim() - 1, N = weight_.size(0), K = weight_.size(1);
  STD_TORCH_CHECK(input_.size(last) == K, "input: expected ", K, " columns, got ", input_.size(last));
  check_like("weight", weight_, input_);
  if (bias_) {
    check_like("bias", *bias_, input_);
    check_shape("bias", *bias_, {N});
  }
  const Tensor input = input_.dim() == 2 ? with_contiguous_rows(input_) : as_contiguous(input_);
  const Tensor weight = as_contiguous(weight_);
  const std::optional<Tensor> bias = as_contiguous(bias_);
  Linear linear{};
  linear.dtype = dtype_of(input);
  ++forward_calls.calls;

  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = N;
  linear.rows = 1;
  for (int64_t i = 0; i < last; ++i) linear.rows *= sizes[size_t(i)];
  linear.in_features = K;
  linear.out_features = N;
  linear.input = input.const_data_ptr();
  linear.input_stride = last == 1 ? input.stride(0) : K;
  linear.weight = weight.const_data_ptr();
  linear.bias = data(bias);
  Tensor output = new_tensor(input, sizes);
  linear.output = output.mutable_data_ptr();
  CallRuntime runtime(2.0 * double(linear.rows) * double(N) * double(K));
  kernels().linear_forward(linear, runtime.get());
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) { m.impl("linear_forward", TORCH_BOX(&linear_forward)); }

}  // namespace genkernels
