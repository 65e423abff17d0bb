// genkernels::gru_forward and gru_backward, the same of both directions, bidirectional_gru_forward and
// bidirectional_gru_backward, and of one step, gru_cell_forward and gru_cell_backward. Schemas and their meaning:
// genkernels/ops/gru.py.
#include <torch/csrc/stable/library.h>

#include <cstddef>
#include <cstring>
#include <iterator>
#include <tuple>
#include <utility>

#include "../dispatch.h"
#include "checks.h"
#include "runtime.h"
#include "stats.h"
#include "tensors.h"

namespace genkernels {
namespace {

using OptionalTensor = std::optional<Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using GradientsAndStates = decltype(std::tuple_cat(Gradients(), std::tuple<Tensor>()));
using BothGradients = decltype(std::tuple_cat(Gradients(), Gradients()));

// The checked, contiguous arguments of a call, alive as long as the kernel reads them.
struct Arguments {
  Tensor input, hx, weight_ih, weight_hh;
  OptionalTensor bias_ih, bias_hh, batch_sizes, resets;
  Gru gru{};
  double operations;

  Arguments(const Tensor& input_, const Tensor& hx_, const Tensor& weight_ih_, const Tensor& weight_hh_,
            const OptionalTensor& bias_ih_, const OptionalTensor& bias_hh_, const OptionalTensor& batch_sizes_,
            const OptionalTensor& resets_, bool reverse, bool is_step)
      : input(with_contiguous_rows(input_)),
        hx(as_contiguous(hx_)),
        weight_ih(as_contiguous(weight_ih_)),
        weight_hh(as_contiguous(weight_hh_)),
        bias_ih(as_contiguous(bias_ih_)),
        bias_hh(as_contiguous(bias_hh_)),
        batch_sizes(as_contiguous(batch_sizes_)),
        resets(as_contiguous(resets_)) {
    STD_TORCH_CHECK(input.dim() == (batch_sizes || is_step ? 2 : 3), "input: got ", input.dim(), " dimensions");
    STD_TORCH_CHECK(hx.dim() == 2, "hx: expected 2 dimensions, got ", hx.dim());
    const int64_t B = hx.size(0), H = hx.size(1), I = input.size(input.dim() - 1);
    gru.dtype = dtype_of(input);
    gru.reverse = reverse;
    gru.steps = is_step ? 1 : batch_sizes ? batch_sizes->size(0) : input.size(0);
    STD_TORCH_CHECK(gru.steps > 0, "input: expected a sequence length larger than 0");
    gru.batch = B;
    gru.input_size = I;
    gru.hidden_size = H;
    if (batch_sizes)
      check_batch_sizes();
    else if (is_step)
      check_shape("input", input, {B, I});
    else
      check_shape("input", input, {gru.steps, B, I});
    for (const auto& [name, tensor] : {std::pair{"hx", &hx}, {"weight_ih", &weight_ih}, {"weight_hh", &weight_hh}})
      check_like(name, *tensor, input);
    check_shape("weight_ih", weight_ih, {3 * H, I});
    check_shape("weight_hh", weight_hh, {3 * H, H});
    STD_TORCH_CHECK(bias_ih.has_value() == bias_hh.has_value(), "bias_ih, bias_hh: expected both or none");
    if (bias_ih) {
      check_like("bias_ih", *bias_ih, input);
      check_like("bias_hh", *bias_hh, input);
      check_shape("bias_ih", *bias_ih, {3 * H});
      check_shape("bias_hh", *bias_hh, {3 * H});
    }
    if (resets) {
      STD_TORCH_CHECK(!batch_sizes && resets->is_cpu() && resets->scalar_type() == ScalarType::Bool,
                      "resets: expected a bool CPU tensor, and no batch_sizes beside it");
      check_shape("resets", *resets, {gru.steps, B});
      gru.resets = static_cast<const bool*>(resets->const_data_ptr());
    }
    gru.input = input.const_data_ptr();
    gru.input_stride_t = input.stride(0);
    gru.input_stride_b = input.stride(input.dim() - 2);
    gru.hx = hx.const_data_ptr();
    gru.weight_ih = weight_ih.const_data_ptr();
    gru.weight_hh = weight_hh.const_data_ptr();
    gru.bias_ih = data(bias_ih);
    gru.bias_hh = data(bias_hh);
    const double rows = batch_sizes ? double(input.size(0)) : double(gru.steps) * double(B);
    operations = 6.0 * rows * double(H) * double(I + H);
  }

  // [T, B, columns], [sum(batch_sizes), columns], or [B, columns] for one step.
  Tensor new_output() const {
    const int64_t H = gru.hidden_size;
    return input.dim() == 2 ? new_tensor(input, {input.size(0), H}) : new_tensor(input, {gru.steps, gru.batch, H});
  }
  Tensor new_rows(int64_t columns) const {
    return input.dim() == 2 ? new_kept(input, {input.size(0), columns})
                            : new_kept(input, {gru.steps, gru.batch, columns});
  }

 private:
  void check_batch_sizes() {
    STD_TORCH_CHECK(batch_sizes->is_cpu() && batch_sizes->scalar_type() == ScalarType::Long && batch_sizes->dim() == 1,
                    "batch_sizes: expected a CPU tensor of int64 with 1 dimension");
    const int64_t* sizes = static_cast<const int64_t*>(batch_sizes->const_data_ptr());
    int64_t rows = 0;
    for (int64_t t = 0; t < gru.steps; ++t) {
      STD_TORCH_CHECK(sizes[t] > 0 && (t == 0 ? sizes[t] == gru.batch : sizes[t] <= sizes[t - 1]),
                      "batch_sizes: expected hx's batch size ", gru.batch, " first, then positive, never larger sizes");
      rows += sizes[t];
    }
    STD_TORCH_CHECK(rows == input.size(0), "batch_sizes: expected a sum of ", input.size(0), " rows of input, got ",
                    rows);
    gru.batch_sizes = sizes;
  }
};

// A forward call's results: h_n not of one step.
struct Forward {
  Arguments arguments;
  Tensor output, h_n, gates;

  Forward(Arguments&& of, bool is_step, bool save_gates)
      : arguments(std::move(of)),
        output(arguments.new_output()),
        h_n(is_step ? arguments.hx : new_tensor(arguments.hx, {arguments.gru.batch, arguments.gru.hidden_size})),
        gates(save_gates ? arguments.new_rows(4 * arguments.gru.hidden_size) : new_tensor(arguments.input, {0})) {
    Gru& gru = arguments.gru;
    gru.output = output.mutable_data_ptr();
    gru.h_n = is_step ? nullptr : h_n.mutable_data_ptr();
    gru.gates = save_gates ? gates.mutable_data_ptr() : nullptr;
  }
};

// A backward call's checked arguments and its results.
struct Backward {
  Arguments arguments;
  OptionalTensor grad_output, grad_h_n;
  Tensor output, gates;
  GruGradients grad{};
  Tensor grad_input, grad_hx, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh, grad_states;

  Backward(Arguments&& of, const OptionalTensor& grad_output_, const OptionalTensor& grad_h_n_, const Tensor& output_,
           const Tensor& gates_, bool input_grad, bool weight_grad, bool states_grad)
      : arguments(std::move(of)),
        grad_output(grad_output_ ? OptionalTensor(with_contiguous_rows(*grad_output_)) : std::nullopt),
        grad_h_n(as_contiguous(grad_h_n_)),
        output(as_contiguous(output_)),
        gates(as_contiguous(gates_)),
        grad_input(input_grad ? arguments.new_rows(arguments.gru.input_size) : none()),
        grad_hx(new_tensor(arguments.input, {arguments.gru.batch, arguments.gru.hidden_size})),
        grad_weight_ih(weight_grad ? new_kept(arguments.input, {3 * H(), arguments.gru.input_size}) : none()),
        grad_weight_hh(weight_grad ? new_kept(arguments.input, {3 * H(), H()}) : none()),
        grad_bias_ih(weight_grad && arguments.bias_ih ? new_kept(arguments.input, {3 * H()}) : none()),
        grad_bias_hh(weight_grad && arguments.bias_ih ? new_kept(arguments.input, {3 * H()}) : none()),
        grad_states(states_grad ? arguments.new_rows(H()) : none()) {
    Gru& gru = arguments.gru;
    const bool has_gates = gates.numel() > 0;
    check_rows("output", output, H());
    if (has_gates) check_rows("gates", gates, 4 * H());
    if (grad_output) {
      check_rows("grad_output", *grad_output, H());
      grad.grad_output = grad_output->const_data_ptr();
      grad.grad_output_stride_t = grad_output->stride(0);
      grad.grad_output_stride_b = grad_output->stride(grad_output->dim() - 2);
    }
    if (grad_h_n) {
      check_like("grad_h_n", *grad_h_n, arguments.input);
      check_shape("grad_h_n", *grad_h_n, {gru.batch, H()});
      grad.grad_h_n = grad_h_n->const_data_ptr();
    }
    gru.output = const_cast<void*>(output.const_data_ptr());
    gru.gates = has_gates ? const_cast<void*>(gates.const_data_ptr()) : nullptr;
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
  int64_t H() const { return arguments.gru.hidden_size; }
  Tensor none() const { return new_tensor(arguments.input, {0}); }
  void check_rows(const char* name, const Tensor& tensor, int64_t columns) const {
    check_like(name, tensor, arguments.input);
    if (arguments.input.dim() == 2)
      check_shape(name, tensor, {arguments.input.size(0), columns});
    else
      check_shape(name, tensor, {arguments.gru.steps, arguments.gru.batch, columns});
  }
};

template <class... Directions>
void run(Forward& first, Directions&... others) {
  const Gru gru[] = {first.arguments.gru, others.arguments.gru...};
  CallRuntime runtime((first.arguments.operations + ... + others.arguments.operations));
  kernels().gru_forward(gru, std::size(gru), runtime.get());
}

template <class... Directions>
void run(Backward& first, Directions&... others) {
  const Gru gru[] = {first.arguments.gru, others.arguments.gru...};
  const GruGradients grad[] = {first.grad, others.grad...};
  CallRuntime runtime(2 * (first.arguments.operations + ... + others.arguments.operations));
  kernels().gru_backward(gru, grad, std::size(gru), runtime.get());
}

// What packed weights begin with: how they lie depends on the SIMD level, which may change.
struct PackedHeader {
  static constexpr int64_t kBytes = 64;
  int64_t level, dtype, input_size, hidden_size;

  explicit PackedHeader(const Gru& gru)
      : level(&kernels() - built_levels()),
        dtype(int64_t(gru.dtype)),
        input_size(gru.input_size),
        hidden_size(gru.hidden_size) {}
};

const void* packed_data(const OptionalTensor& tensor, const Gru& gru) {
  if (!tensor) return nullptr;
  const Tensor& packed = *tensor;
  const PackedHeader header(gru);
  const int64_t bytes = PackedHeader::kBytes + kernels().gru_packed_size(gru);
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 &&
                      packed.is_contiguous() && packed.numel() == bytes &&
                      std::memcmp(packed.const_data_ptr(), &header, sizeof header) == 0,
                  "packed: expected what gru_pack makes of such weights at SIMD level ", kernels().level);
  return static_cast<const std::byte*>(packed.const_data_ptr()) + PackedHeader::kBytes;
}

Tensor gru_pack(Tensor weight_ih, Tensor weight_hh, OptionalTensor bias_ih, OptionalTensor bias_hh) {
  STD_TORCH_CHECK(weight_ih.dim() == 2 && weight_hh.dim() == 2, "weight_ih, weight_hh: expected 2 dimensions");
  // A step of no rows: it has the sizes, and the checks, of every call that these weights are for.
  const Tensor input = new_tensor(weight_ih, {0, weight_ih.size(1)}),
               hx = new_tensor(weight_hh, {0, weight_hh.size(1)});
  Arguments arguments(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, {}, {}, false, true);
  const Gru& gru = arguments.gru;
  const int64_t bytes = PackedHeader::kBytes + kernels().gru_packed_size(gru);
  Tensor packed = torch::stable::empty({bytes}, ScalarType::Byte);
  std::byte* data = static_cast<std::byte*>(packed.mutable_data_ptr());
  const PackedHeader header(gru);
  std::memcpy(data, &header, sizeof header);
  const CallRuntime runtime(static_cast<double>(bytes));
  kernels().gru_pack(gru, data + PackedHeader::kBytes, runtime.get());
  return packed;
}

// Directions of one call have the same sizes.
void check_directions(const Arguments& first, const Arguments& second) {
  check_shape("hx_reverse", second.hx, {first.gru.batch, first.gru.hidden_size});
}

CallCounter forward_calls("gru_forward"), backward_calls("gru_backward");
CallCounter both_forward_calls("bidirectional_gru_forward"), both_backward_calls("bidirectional_gru_backward");
CallCounter cell_forward_calls("gru_cell_forward"), cell_backward_calls("gru_cell_backward");

std::tuple<Tensor, Tensor, Tensor> gru_forward(Tensor input, Tensor hx, Tensor weight_ih, Tensor weight_hh,
                                               OptionalTensor bias_ih, OptionalTensor bias_hh,
                                               OptionalTensor batch_sizes, OptionalTensor resets, bool reverse,
                                               bool save_gates, OptionalTensor packed) {
  Arguments arguments(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, resets, reverse, false);
  arguments.gru.packed = packed_data(packed, arguments.gru);
  ++forward_calls.calls;
  Forward call(std::move(arguments), false, save_gates);
  run(call);
  return {call.output, call.h_n, call.gates};
}

GradientsAndStates gru_backward(OptionalTensor grad_output, OptionalTensor grad_h_n, Tensor input, Tensor hx,
                                Tensor weight_ih, Tensor weight_hh, OptionalTensor bias_ih, OptionalTensor bias_hh,
                                Tensor output, Tensor gates, OptionalTensor batch_sizes, OptionalTensor resets,
                                bool reverse, bool input_grad, bool weight_grad, bool states_grad) {
  Arguments arguments(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, resets, reverse, false);
  ++backward_calls.calls;
  Backward call(std::move(arguments), grad_output, grad_h_n, output, gates, input_grad, weight_grad, states_grad);
  run(call);
  return std::tuple_cat(call.gradients(), std::tuple(call.grad_states));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bidirectional_gru_forward(
    Tensor input, Tensor hx, Tensor weight_ih, Tensor weight_hh, OptionalTensor bias_ih, OptionalTensor bias_hh,
    Tensor hx_reverse, Tensor weight_ih_reverse, Tensor weight_hh_reverse, OptionalTensor bias_ih_reverse,
    OptionalTensor bias_hh_reverse, OptionalTensor batch_sizes, bool save_gates, OptionalTensor packed,
    OptionalTensor packed_reverse) {
  Arguments arguments(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, {}, false, false);
  Arguments reverse(input, hx_reverse, weight_ih_reverse, weight_hh_reverse, bias_ih_reverse, bias_hh_reverse,
                    batch_sizes, {}, true, false);
  check_directions(arguments, reverse);
  arguments.gru.packed = packed_data(packed, arguments.gru);
  reverse.gru.packed = packed_data(packed_reverse, reverse.gru);
  ++both_forward_calls.calls;
  Forward calls[] = {{std::move(arguments), false, save_gates}, {std::move(reverse), false, save_gates}};
  run(calls[0], calls[1]);
  return {calls[0].output, calls[0].h_n, calls[0].gates, calls[1].output, calls[1].h_n, calls[1].gates};
}

BothGradients bidirectional_gru_backward(OptionalTensor grad_output, OptionalTensor grad_h_n,
                                         OptionalTensor grad_output_reverse, OptionalTensor grad_h_n_reverse,
                                         Tensor input, Tensor hx, Tensor weight_ih, Tensor weight_hh,
                                         OptionalTensor bias_ih, OptionalTensor bias_hh, Tensor hx_reverse,
                                         Tensor weight_ih_reverse, Tensor weight_hh_reverse,
                                         OptionalTensor bias_ih_reverse, OptionalTensor bias_hh_reverse, Tensor output,
                                         Tensor gates, Tensor output_reverse, Tensor gates_reverse,
                                         OptionalTensor batch_sizes, bool input_grad, bool weight_grad) {
  Arguments arguments(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, {}, false, false);
  Arguments reverse(input, hx_reverse, weight_ih_reverse, weight_hh_reverse, bias_ih_reverse, bias_hh_reverse,
                    batch_sizes, {}, true, false);
  check_directions(arguments, reverse);
  ++both_backward_calls.calls;
  Backward calls[] = {{std::move(arguments), grad_output, grad_h_n, output, gates, input_grad, weight_grad, false},
                      {std::move(reverse), grad_output_reverse, grad_h_n_reverse, output_reverse, gates_reverse,
                       input_grad, weight_grad, false}};
  run(calls[0], calls[1]);
  return std::tuple_cat(calls[0].gradients(), calls[1].gradients());
}

std::tuple<Tensor, Tensor> gru_cell_forward(Tensor input, Tensor hx, Tensor weight_ih, Tensor weight_hh,
                                            OptionalTensor bias_ih, OptionalTensor bias_hh, bool save_gates,
                                            OptionalTensor packed) {
  Arguments arguments(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, {}, {}, false, true);
  arguments.gru.packed = packed_data(packed, arguments.gru);
  ++cell_forward_calls.calls;
  Forward call(std::move(arguments), true, save_gates);
  run(call);
  return {call.output, call.gates};
}

Gradients gru_cell_backward(Tensor grad_h, Tensor input, Tensor hx, Tensor weight_ih, Tensor weight_hh,
                            OptionalTensor bias_ih, OptionalTensor bias_hh, Tensor gates, bool input_grad,
                            bool weight_grad) {
  Arguments arguments(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, {}, {}, false, true);
  ++cell_backward_calls.calls;
  // One step enters with hx alone, so its output is not read.
  const Tensor unread = arguments.hx;
  Backward call(std::move(arguments), grad_h, {}, unread, gates, input_grad, weight_grad, false);
  run(call);
  return call.gradients();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  m.impl("gru_pack", TORCH_BOX(&gru_pack));
  m.impl("gru_forward", TORCH_BOX(&gru_forward));
  m.impl("gru_backward", TORCH_BOX(&gru_backward));
  m.impl("bidirectional_gru_forward", TORCH_BOX(&bidirectional_gru_forward));
  m.impl("bidirectional_gru_backward", TORCH_BOX(&bidirectional_gru_backward));
  m.impl("gru_cell_forward", TORCH_BOX(&gru_cell_forward));
  m.impl("gru_cell_backward", TORCH_BOX(&gru_cell_backward));
}

}  // namespace genkernels
