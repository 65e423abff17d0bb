// What the ops of every recurrent cell share: the checks of their arguments, and their results.
#pragma once

#include <tuple>
#include <utility>

#include "../kernels/recurrent.h"
#include "checks.h"
#include "tensors.h"

namespace genkernels {

using OptionalTensor = std::optional<Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using GradientsAndStates = decltype(std::tuple_cat(Gradients(), std::tuple<Tensor>()));

// The checked, contiguous arguments of a call of a cell of `gates` gates, alive as long as the kernel reads them.
struct RecurrentArguments {
  Tensor input, hx, weight_ih, weight_hh;
  OptionalTensor bias_ih, bias_hh, batch_sizes, resets;
  Recurrent layer{};
  int64_t gates;
  double operations;

  RecurrentArguments(const Tensor& input_, const Tensor& hx_, const Tensor& weight_ih_, const Tensor& weight_hh_,
                     const OptionalTensor& bias_ih_, const OptionalTensor& bias_hh_, const OptionalTensor& batch_sizes_,
                     const OptionalTensor& resets_, bool reverse, bool is_step, int64_t gates_)
      : input(with_contiguous_rows(input_)),
        hx(as_contiguous(hx_)),
        weight_ih(as_contiguous(weight_ih_)),
        weight_hh(as_contiguous(weight_hh_)),
        bias_ih(as_contiguous(bias_ih_)),
        bias_hh(as_contiguous(bias_hh_)),
        batch_sizes(as_contiguous(batch_sizes_)),
        resets(as_contiguous(resets_)),
        gates(gates_) {
    STD_TORCH_CHECK(input.dim() == (batch_sizes || is_step ? 2 : 3), "input: got ", input.dim(), " dimensions");
    STD_TORCH_CHECK(hx.dim() == 2, "hx: expected 2 dimensions, got ", hx.dim());
    const int64_t B = hx.size(0), H = hx.size(1), I = input.size(input.dim() - 1);
    layer.dtype = dtype_of(input);
    layer.reverse = reverse;
    layer.steps = is_step ? 1 : batch_sizes ? batch_sizes->size(0) : input.size(0);
    STD_TORCH_CHECK(layer.steps > 0, "input: expected a sequence length larger than 0");
    layer.batch = B;
    layer.input_size = I;
    layer.hidden_size = H;
    if (batch_sizes)
      check_batch_sizes();
    else if (is_step)
      check_shape("input", input, {B, I});
    else
      check_shape("input", input, {layer.steps, B, I});
    for (const auto& [name, tensor] : {std::pair{"hx", &hx}, {"weight_ih", &weight_ih}, {"weight_hh", &weight_hh}})
      check_like(name, *tensor, input);
    check_shape("weight_ih", weight_ih, {gates * H, I});
    check_shape("weight_hh", weight_hh, {gates * H, H});
    STD_TORCH_CHECK(bias_ih.has_value() == bias_hh.has_value(), "bias_ih, bias_hh: expected both or none");
    if (bias_ih) {
      check_like("bias_ih", *bias_ih, input);
      check_like("bias_hh", *bias_hh, input);
      check_shape("bias_ih", *bias_ih, {gates * H});
      check_shape("bias_hh", *bias_hh, {gates * H});
    }
    if (resets) {
      STD_TORCH_CHECK(!batch_sizes && resets->is_cpu() && resets->scalar_type() == ScalarType::Bool,
                      "resets: expected a bool CPU tensor, and no batch_sizes beside it");
      check_shape("resets", *resets, {layer.steps, B});
      layer.resets = static_cast<const bool*>(resets->const_data_ptr());
    }
    layer.input = input.const_data_ptr();
    layer.input_stride_t = input.stride(0);
    layer.input_stride_b = input.stride(input.dim() - 2);
    layer.hx = hx.const_data_ptr();
    layer.weight_ih = weight_ih.const_data_ptr();
    layer.weight_hh = weight_hh.const_data_ptr();
    layer.bias_ih = data(bias_ih);
    layer.bias_hh = data(bias_hh);
    const double rows = batch_sizes ? double(input.size(0)) : double(layer.steps) * double(B);
    operations = 2.0 * rows * double(gates * H) * double(I + H);
  }

  // [T, B, columns], [sum(batch_sizes), columns], or [B, columns] for one step.
  Tensor new_output() const {
    const int64_t H = layer.hidden_size;
    return input.dim() == 2 ? new_tensor(input, {input.size(0), H}) : new_tensor(input, {layer.steps, layer.batch, H});
  }
  Tensor new_rows(int64_t columns) const {
    return input.dim() == 2 ? new_kept(input, {input.size(0), columns})
                            : new_kept(input, {layer.steps, layer.batch, columns});
  }

 private:
  void check_batch_sizes() {
    STD_TORCH_CHECK(batch_sizes->is_cpu() && batch_sizes->scalar_type() == ScalarType::Long && batch_sizes->dim() == 1,
                    "batch_sizes: expected a CPU tensor of int64 with 1 dimension");
    const int64_t* sizes = static_cast<const int64_t*>(batch_sizes->const_data_ptr());
    int64_t rows = 0;
    for (int64_t t = 0; t < layer.steps; ++t) {
      STD_TORCH_CHECK(sizes[t] > 0 && (t == 0 ? sizes[t] == layer.batch : sizes[t] <= sizes[t - 1]),
                      "batch_sizes: expected hx's batch size ", layer.batch,
                      " first, then positive, never larger sizes");
      rows += sizes[t];
    }
    STD_TORCH_CHECK(rows == input.size(0), "batch_sizes: expected a sum of ", input.size(0), " rows of input, got ",
                    rows);
    layer.batch_sizes = sizes;
  }
};

// A forward call's results: h_n not of one step. `saved` values of each unit are.
struct RecurrentForward {
  RecurrentArguments arguments;
  Tensor output, h_n, gates;

  RecurrentForward(RecurrentArguments&& of, bool is_step, int64_t saved)
      : arguments(std::move(of)),
        output(arguments.new_output()),
        h_n(is_step ? arguments.hx : new_tensor(arguments.hx, {arguments.layer.batch, arguments.layer.hidden_size})),
        gates(saved > 0 ? arguments.new_rows(saved * arguments.layer.hidden_size) : new_tensor(arguments.input, {0})) {
    Recurrent& layer = arguments.layer;
    layer.output = output.mutable_data_ptr();
    layer.h_n = is_step ? nullptr : h_n.mutable_data_ptr();
    layer.gates = saved > 0 ? gates.mutable_data_ptr() : nullptr;
  }
};

// A backward call's checked arguments and its results.
struct RecurrentBackward {
  RecurrentArguments arguments;
  OptionalTensor grad_output, grad_h_n;
  Tensor output;
  OptionalTensor gates;
  RecurrentGradients grad{};
  Tensor grad_input, grad_hx, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh, grad_states;

  RecurrentBackward(RecurrentArguments&& of, const OptionalTensor& grad_output_, const OptionalTensor& grad_h_n_,
                    const Tensor& output_, const OptionalTensor& gates_, int64_t saved, bool input_grad,
                    bool weight_grad, bool states_grad)
      : arguments(std::move(of)),
        grad_output(grad_output_ ? OptionalTensor(with_contiguous_rows(*grad_output_)) : std::nullopt),
        grad_h_n(as_contiguous(grad_h_n_)),
        output(as_contiguous(output_)),
        gates(as_contiguous(gates_)),
        grad_input(input_grad ? arguments.new_rows(arguments.layer.input_size) : none()),
        grad_hx(new_tensor(arguments.input, {arguments.layer.batch, arguments.layer.hidden_size})),
        grad_weight_ih(weight_grad ? new_kept(arguments.input, {GH(), arguments.layer.input_size}) : none()),
        grad_weight_hh(weight_grad ? new_kept(arguments.input, {GH(), H()}) : none()),
        grad_bias_ih(weight_grad && arguments.bias_ih ? new_kept(arguments.input, {GH()}) : none()),
        grad_bias_hh(weight_grad && arguments.bias_ih ? new_kept(arguments.input, {GH()}) : none()),
        grad_states(states_grad ? arguments.new_rows(H()) : none()) {
    Recurrent& layer = arguments.layer;
    const bool has_gates = gates && gates->numel() > 0;
    check_rows("output", output, H());
    if (has_gates) check_rows("gates", *gates, saved * H());
    if (grad_output) {
      check_rows("grad_output", *grad_output, H());
      grad.grad_output = grad_output->const_data_ptr();
      grad.grad_output_stride_t = grad_output->stride(0);
      grad.grad_output_stride_b = grad_output->stride(grad_output->dim() - 2);
    }
    if (grad_h_n) {
      check_like("grad_h_n", *grad_h_n, arguments.input);
      check_shape("grad_h_n", *grad_h_n, {layer.batch, H()});
      grad.grad_h_n = grad_h_n->const_data_ptr();
    }
    layer.output = const_cast<void*>(output.const_data_ptr());
    layer.gates = has_gates ? const_cast<void*>(gates->const_data_ptr()) : nullptr;
    const auto data_if = [](bool is_wanted, Tensor& of) { return is_wanted ? of.mutable_data_ptr() : nullptr; };
    grad.grad_input = data_if(input_grad, grad_input);
    grad.grad_hx = grad_hx.mutable_data_ptr();
    grad.grad_states = data_if(states_grad, grad_states);
    grad.needs_weights = weight_grad;
    grad.grad_weight_ih = data_if(weight_grad, grad_weight_ih);
    grad.grad_weight_hh = data_if(weight_grad, grad_weight_hh);
    grad.grad_bias_ih = data_if(weight_grad && arguments.bias_ih, grad_bias_ih);
    grad.grad_bias_hh = data_if(weight_grad && arguments.bias_ih, grad_bias_hh);
  }

  Gradients gradients() const {
    return {grad_input, grad_hx, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh};
  }

 private:
  int64_t H() const { return arguments.layer.hidden_size; }
  int64_t GH() const { return arguments.gates * H(); }
  Tensor none() const { return new_tensor(arguments.input, {0}); }
  void check_rows(const char* name, const Tensor& tensor, int64_t columns) const {
    check_like(name, tensor, arguments.input);
    if (arguments.input.dim() == 2)
      check_shape(name, tensor, {arguments.input.size(0), columns});
    else
      check_shape(name, tensor, {arguments.layer.steps, arguments.layer.batch, columns});
  }
};

}  // namespace genkernels
