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
#include "recurrent.h"
#include "runtime.h"
#include "stats.h"

namespace genkernels {
namespace {

using BothGradients = decltype(std::tuple_cat(Gradients(), Gradients()));

constexpr int64_t kSaved = 4;  // r, z, n and W_hn h + b_hn of each unit

struct GruArguments : RecurrentArguments {
  GruArguments(const Tensor& input, const Tensor& hx, const Tensor& weight_ih, const Tensor& weight_hh,
               const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, const OptionalTensor& batch_sizes,
               const OptionalTensor& resets, bool reverse, bool is_step)
      : RecurrentArguments(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, resets, reverse, is_step,
                           3) {}
};

template <class... Directions>
void run(RecurrentForward& first, Directions&... others) {
  const Recurrent gru[] = {first.arguments.layer, others.arguments.layer...};
  CallRuntime runtime((first.arguments.operations + ... + others.arguments.operations));
  kernels().gru_forward(gru, std::size(gru), runtime.get());
}

template <class... Directions>
void run(RecurrentBackward& first, Directions&... others) {
  const Recurrent gru[] = {first.arguments.layer, others.arguments.layer...};
  const RecurrentGradients grad[] = {first.grad, others.grad...};
  CallRuntime runtime(2 * (first.arguments.operations + ... + others.arguments.operations));
  kernels().gru_backward(gru, grad, std::size(gru), runtime.get());
}

// What packed weights begin with: how they lie depends on the SIMD level, which may change.
struct PackedHeader {
  static constexpr int64_t kBytes = 64;
  int64_t level, dtype, input_size, hidden_size;

  explicit PackedHeader(const Recurrent& gru)
      : level(&kernels() - built_levels()),
        dtype(int64_t(gru.dtype)),
        input_size(gru.input_size),
        hidden_size(gru.hidden_size) {}
};

const void* packed_data(const OptionalTensor& tensor, const Recurrent& gru) {
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
  GruArguments arguments(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, {}, {}, false, true);
  const Recurrent& gru = arguments.layer;
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
void check_directions(const GruArguments& first, const GruArguments& second) {
  check_shape("hx_reverse", second.hx, {first.layer.batch, first.layer.hidden_size});
}

CallCounter forward_calls("gru_forward"), backward_calls("gru_backward");
CallCounter both_forward_calls("bidirectional_gru_forward"), both_backward_calls("bidirectional_gru_backward");
CallCounter cell_forward_calls("gru_cell_forward"), cell_backward_calls("gru_cell_backward");

std::tuple<Tensor, Tensor, Tensor> gru_forward(Tensor input, Tensor hx, Tensor weight_ih, Tensor weight_hh,
                                               OptionalTensor bias_ih, OptionalTensor bias_hh,
                                               OptionalTensor batch_sizes, OptionalTensor resets, bool reverse,
                                               bool save_gates, OptionalTensor packed) {
  GruArguments arguments(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, resets, reverse, false);
  arguments.layer.packed = packed_data(packed, arguments.layer);
  ++forward_calls.calls;
  RecurrentForward call(std::move(arguments), false, save_gates ? kSaved : 0);
  run(call);
  return {call.output, call.h_n, call.gates};
}

GradientsAndStates gru_backward(OptionalTensor grad_output, OptionalTensor grad_h_n, Tensor input, Tensor hx,
                                Tensor weight_ih, Tensor weight_hh, OptionalTensor bias_ih, OptionalTensor bias_hh,
                                Tensor output, Tensor gates, OptionalTensor batch_sizes, OptionalTensor resets,
                                bool reverse, bool input_grad, bool weight_grad, bool states_grad) {
  GruArguments arguments(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, resets, reverse, false);
  ++backward_calls.calls;
  RecurrentBackward call(std::move(arguments), grad_output, grad_h_n, output, gates, kSaved, input_grad, weight_grad,
                         states_grad);
  run(call);
  return std::tuple_cat(call.gradients(), std::tuple(call.grad_states));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bidirectional_gru_forward(
    Tensor input, Tensor hx, Tensor weight_ih, Tensor weight_hh, OptionalTensor bias_ih, OptionalTensor bias_hh,
    Tensor hx_reverse, Tensor weight_ih_reverse, Tensor weight_hh_reverse, OptionalTensor bias_ih_reverse,
    OptionalTensor bias_hh_reverse, OptionalTensor batch_sizes, bool save_gates, OptionalTensor packed,
    OptionalTensor packed_reverse) {
  GruArguments arguments(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, {}, false, false);
  GruArguments reverse(input, hx_reverse, weight_ih_reverse, weight_hh_reverse, bias_ih_reverse, bias_hh_reverse,
                       batch_sizes, {}, true, false);
  check_directions(arguments, reverse);
  arguments.layer.packed = packed_data(packed, arguments.layer);
  reverse.layer.packed = packed_data(packed_reverse, reverse.layer);
  ++both_forward_calls.calls;
  RecurrentForward calls[] = {{std::move(arguments), false, save_gates ? kSaved : 0},
                              {std::move(reverse), false, save_gates ? kSaved : 0}};
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
  GruArguments arguments(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, {}, false, false);
  GruArguments reverse(input, hx_reverse, weight_ih_reverse, weight_hh_reverse, bias_ih_reverse, bias_hh_reverse,
                       batch_sizes, {}, true, false);
  check_directions(arguments, reverse);
  ++both_backward_calls.calls;
  RecurrentBackward calls[] = {
      {std::move(arguments), grad_output, grad_h_n, output, gates, kSaved, input_grad, weight_grad, false},
      {std::move(reverse), grad_output_reverse, grad_h_n_reverse, output_reverse, gates_reverse, kSaved, input_grad,
       weight_grad, false}};
  run(calls[0], calls[1]);
  return std::tuple_cat(calls[0].gradients(), calls[1].gradients());
}

std::tuple<Tensor, Tensor> gru_cell_forward(Tensor input, Tensor hx, Tensor weight_ih, Tensor weight_hh,
                                            OptionalTensor bias_ih, OptionalTensor bias_hh, bool save_gates,
                                            OptionalTensor packed) {
  GruArguments arguments(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, {}, {}, false, true);
  arguments.layer.packed = packed_data(packed, arguments.layer);
  ++cell_forward_calls.calls;
  RecurrentForward call(std::move(arguments), true, save_gates ? kSaved : 0);
  run(call);
  return {call.output, call.gates};
}

Gradients gru_cell_backward(Tensor grad_h, Tensor input, Tensor hx, Tensor weight_ih, Tensor weight_hh,
                            OptionalTensor bias_ih, OptionalTensor bias_hh, Tensor gates, bool input_grad,
                            bool weight_grad) {
  GruArguments arguments(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, {}, {}, false, true);
  ++cell_backward_calls.calls;
  // One step enters with hx alone, so its output is not read.
  const Tensor unread = arguments.hx;
  RecurrentBackward call(std::move(arguments), grad_h, {}, unread, gates, kSaved, input_grad, weight_grad, false);
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
