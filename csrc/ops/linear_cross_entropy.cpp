// genkernels::linear_cross_entropy_pass. Schema and meaning: genkernels/ops/linear_cross_entropy.py.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../dispatch.h"
#include "checks.h"
#include "runtime.h"
#include "stats.h"
#include "tensors.h"

namespace genkernels {
namespace {

CallCounter calls("linear_cross_entropy_pass");

void check_accumulator(const char* name, const Tensor& tensor, const Tensor& input) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == accumulator_dtype(input), name,
                  ": expected a CPU tensor of input's dtype, or of float32 beside bfloat16");
}

void check_target(const Tensor& target, int64_t classes, int64_t ignore_index) {
  STD_TORCH_CHECK(target.is_cpu() && target.scalar_type() == ScalarType::Long,
                  "target: expected a CPU tensor of int64");
  const auto* values = static_cast<const int64_t*>(target.const_data_ptr());
  for (int64_t i = 0; i < target.size(0); ++i)
    STD_TORCH_CHECK(values[i] == ignore_index || (values[i] >= 0 && values[i] < classes),
                    "target: expected classes in [0, ", classes, ") or ignore_index (", ignore_index, "), got ",
                    values[i], " at ", i);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_pass(
    Tensor input_, Tensor linear_weight_, Tensor target_, std::optional<Tensor> linear_bias_,
    std::optional<Tensor> weight_, std::optional<Tensor> grad_loss_, int64_t reduction, int64_t ignore_index,
    double label_smoothing, bool predicts, bool needs_input, bool needs_weight, bool needs_bias) {
  STD_TORCH_CHECK(input_.dim() == 2, "input: expected 2 dimensions, got ", input_.dim());
  STD_TORCH_CHECK(linear_weight_.dim() == 2, "linear_weight: expected 2 dimensions, got ", linear_weight_.dim());
  STD_TORCH_CHECK(reduction >= 0 && reduction <= 2, "reduction: expected 0, 1 or 2, got ", reduction);
  const int64_t N = input_.size(0), K = input_.size(1), V = linear_weight_.size(0);
  STD_TORCH_CHECK(V > 0, "linear_weight: expected at least 1 class");
  check_like("linear_weight", linear_weight_, input_);
  check_shape("linear_weight", linear_weight_, {V, K});
  check_shape("target", target_, {N});
  if (linear_bias_) {
    check_like("linear_bias", *linear_bias_, input_);
    check_shape("linear_bias", *linear_bias_, {V});
  }
  if (weight_) {
    check_accumulator("weight", *weight_, input_);
    check_shape("weight", *weight_, {V});
  }
  if (grad_loss_) {
    check_accumulator("grad_loss", *grad_loss_, input_);
    if (reduction == int64_t(Reduction::none))
      check_shape("grad_loss", *grad_loss_, {N});
    else
      check_shape("grad_loss", *grad_loss_, {});
  }
  STD_TORCH_CHECK(!needs_bias || linear_bias_, "needs_bias: there is no linear_bias");
  const Tensor input = with_contiguous_rows(input_), target = as_contiguous(target_);
  const Tensor linear_weight = as_contiguous(linear_weight_);
  const std::optional<Tensor> linear_bias = as_contiguous(linear_bias_), weight = as_contiguous(weight_);
  const std::optional<Tensor> grad_loss = as_contiguous(grad_loss_);
  check_target(target, V, ignore_index);
  ++calls.calls;

  LinearCrossEntropy arguments{};
  arguments.dtype = dtype_of(input);
  arguments.rows = N;
  arguments.in_features = K;
  arguments.classes = V;
  arguments.input = input.const_data_ptr();
  arguments.input_stride = input.stride(0);
  arguments.linear_weight = linear_weight.const_data_ptr();
  arguments.linear_bias = data(linear_bias);
  arguments.target = static_cast<const int64_t*>(target.const_data_ptr());
  arguments.weight = data(weight);
  arguments.ignore_index = ignore_index;
  arguments.label_smoothing = label_smoothing;
  arguments.reduction = Reduction(reduction);
  arguments.grad_loss = data(grad_loss);

  const Tensor loss = new_accumulator(input, arguments.reduction == Reduction::none ? Sizes({N}) : Sizes({}));
  const Tensor prediction = new_tensor(target, {predicts ? N : 0});
  const Tensor grad_input = new_kept(input, {needs_input ? N : 0, K});
  const Tensor grad_linear_weight = new_kept(input, {needs_weight ? V : 0, K});
  const Tensor grad_linear_bias = new_kept(input, {needs_bias ? V : 0});
  arguments.loss = loss.mutable_data_ptr();
  if (predicts) arguments.predictions = static_cast<int64_t*>(prediction.mutable_data_ptr());
  if (needs_input) arguments.grad_input = grad_input.mutable_data_ptr();
  if (needs_weight) arguments.grad_linear_weight = grad_linear_weight.mutable_data_ptr();
  if (needs_bias) arguments.grad_linear_bias = grad_linear_bias.mutable_data_ptr();
  CallRuntime runtime(2.0 * double(N) * double(V) * double(K));
  kernels().linear_cross_entropy(arguments, runtime.get());
  return {loss, prediction, grad_input, grad_linear_weight, grad_linear_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  m.impl("linear_cross_entropy_pass", TORCH_BOX(&linear_cross_entropy_pass));
}

}  // namespace genkernels
