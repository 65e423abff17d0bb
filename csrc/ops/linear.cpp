// genkernels::linear_forward, linear_forward_saving and linear_backward. Schema and meaning: genkernels/ops/linear.py.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../dispatch.h"
#include "checks.h"
#include "runtime.h"
#include "stats.h"
#include "tensors.h"

namespace genkernels {
namespace {

CallCounter forward_calls("linear_forward"), backward_calls("linear_backward");

Tensor with_rows(const Tensor& tensor) {
  return tensor.dim() == 2 ? with_contiguous_rows(tensor) : as_contiguous(tensor);
}

int64_t row_stride(const Tensor& tensor) {
  return tensor.dim() == 2 ? tensor.stride(0) : tensor.size(tensor.dim() - 1);
}

int64_t row_count(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) rows *= tensor.size(i);
  return rows;
}

std::vector<int64_t> with_columns(const Tensor& tensor, int64_t columns) {
  std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
  sizes.back() = columns;
  return sizes;
}

void check_rows(const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(tensor.dim() > 0 && tensor.size(tensor.dim() - 1) == columns && row_count(tensor) == rows, name,
                  ": expected ", rows, " rows of ", columns, " columns, got shape ", shape_string(tensor.sizes()));
}

void check_activation(int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation <= int64_t(Activation::silu),
                  "activation: expected a number from 0 to 4, got ", activation);
}

// A parameter is of input's dtype, or of float32 beside bfloat16: it is narrowed as it is packed.
void check_parameter(const char* name, const Tensor& parameter, const Tensor& input) {
  const bool is_wider = parameter.scalar_type() == ScalarType::Float && input.scalar_type() == ScalarType::BFloat16;
  if (!is_wider || !parameter.is_cpu()) check_like(name, parameter, input);
}

// The output; and, where `pre_activation` is given, a tensor of what the activation is taken of.
Tensor forward(const Tensor& input_, const Tensor& weight_, const std::optional<Tensor>& bias_, int64_t activation,
               std::optional<Tensor>* pre_activation) {
  STD_TORCH_CHECK(input_.dim() > 0, "input: expected at least 1 dimension");
  STD_TORCH_CHECK(weight_.dim() == 2, "weight: expected 2 dimensions, got ", weight_.dim());
  check_rows("input", input_, row_count(input_), weight_.size(1));
  check_parameter("weight", weight_, input_);
  check_activation(activation);
  const int64_t N = weight_.size(0);
  if (bias_) {
    check_like("bias", *bias_, weight_);
    check_shape("bias", *bias_, {N});
  }
  const Tensor input = with_rows(input_), weight = as_contiguous(weight_);
  const std::optional<Tensor> bias = as_contiguous(bias_);
  Linear linear{};
  linear.dtype = dtype_of(input);
  linear.weight_dtype = dtype_of(weight);
  ++forward_calls.calls;

  linear.rows = row_count(input);
  linear.in_features = weight.size(1);
  linear.out_features = N;
  linear.input = input.const_data_ptr();
  linear.input_stride = row_stride(input);
  linear.weight = weight.const_data_ptr();
  linear.bias = data(bias);
  linear.activation = Activation(activation);
  const Tensor output = new_kept(input, with_columns(input, N));
  linear.output = output.mutable_data_ptr();
  if (pre_activation != nullptr) {
    *pre_activation = new_kept(input, with_columns(input, N));
    linear.pre_activation = (*pre_activation)->mutable_data_ptr();
  }
  CallRuntime runtime(2.0 * double(linear.rows) * double(N) * double(linear.in_features));
  kernels().linear_forward(linear, runtime.get());
  return output;
}

Tensor linear_forward(Tensor input, Tensor weight, std::optional<Tensor> bias, int64_t activation) {
  return forward(input, weight, bias, activation, nullptr);
}

std::tuple<Tensor, Tensor> linear_forward_saving(Tensor input, Tensor weight, std::optional<Tensor> bias,
                                                 int64_t activation) {
  std::optional<Tensor> pre_activation;
  const Tensor output = forward(input, weight, bias, activation, &pre_activation);
  return {output, *pre_activation};
}

// The gradient of the input where there is a weight, of the weight where there is an input. `is_wider` says that the
// parameters, and so their gradients, are of float32 beside bfloat16.
std::tuple<Tensor, Tensor, Tensor> linear_backward(Tensor grad_output_, std::optional<Tensor> input_,
                                                   std::optional<Tensor> weight_, std::optional<Tensor> saved_,
                                                   int64_t activation, bool needs_bias, bool is_wider) {
  STD_TORCH_CHECK(grad_output_.dim() > 0, "grad_output: expected at least 1 dimension");
  const int64_t M = row_count(grad_output_), N = grad_output_.size(grad_output_.dim() - 1);
  int64_t K = 0;
  if (weight_) {
    STD_TORCH_CHECK(weight_->dim() == 2 && weight_->size(0) == N, "weight: expected ", N, " rows, got shape ",
                    shape_string(weight_->sizes()));
    check_parameter("weight", *weight_, grad_output_);
    STD_TORCH_CHECK(is_wider == (weight_->scalar_type() != grad_output_.scalar_type()),
                    "is_wider: expected whether weight's dtype differs from grad_output's");
    K = weight_->size(1);
  }
  if (input_) {
    STD_TORCH_CHECK(input_->dim() > 0, "input: expected at least 1 dimension");
    if (!weight_) K = input_->size(input_->dim() - 1);
    check_rows("input", *input_, M, K);
    check_like("input", *input_, grad_output_);
  }
  check_activation(activation);
  STD_TORCH_CHECK(saved_.has_value() == (activation != int64_t(Activation::none)),
                  "saved: expected a tensor with an activation, and none without");
  if (saved_) {
    check_rows("saved", *saved_, M, N);
    check_like("saved", *saved_, grad_output_);
  }
  const Tensor grad_output = with_rows(grad_output_);
  const std::optional<Tensor> weight = as_contiguous(weight_), saved = as_contiguous(saved_);
  const std::optional<Tensor> input = input_ ? std::optional<Tensor>(with_rows(*input_)) : std::nullopt;
  LinearBackward linear{};
  linear.dtype = dtype_of(grad_output);
  STD_TORCH_CHECK(!is_wider || linear.dtype == DType::bfloat16, "is_wider: expected grad_output of bfloat16");
  linear.weight_dtype = is_wider ? DType::float32 : linear.dtype;
  ++backward_calls.calls;

  linear.rows = M;
  linear.in_features = K;
  linear.out_features = N;
  linear.input = data(input);
  linear.input_stride = input ? row_stride(*input) : 0;
  linear.weight = data(weight);
  linear.activation = Activation(activation);
  linear.saved = data(saved);
  linear.grad_output = grad_output.const_data_ptr();
  linear.grad_output_stride = row_stride(grad_output);
  const Tensor grad_input = new_kept(grad_output, weight ? with_columns(grad_output, K) : std::vector<int64_t>{0, K});
  const Tensor grad_weight = new_kept(grad_output, {input ? N : 0, K}, is_wider);
  const Tensor grad_bias = new_kept(grad_output, {needs_bias ? N : 0}, is_wider);
  if (weight) linear.grad_input = grad_input.mutable_data_ptr();
  if (input) linear.grad_weight = grad_weight.mutable_data_ptr();
  if (needs_bias) linear.grad_bias = grad_bias.mutable_data_ptr();
  CallRuntime runtime(2.0 * double(M) * double(N) * double(K));
  kernels().linear_backward(linear, runtime.get());
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  m.impl("linear_forward", TORCH_BOX(&linear_forward));
  m.impl("linear_forward_saving", TORCH_BOX(&linear_forward_saving));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
}

}  // namespace genkernels
