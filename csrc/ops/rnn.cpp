// genkernels::rnn_forward and rnn_backward. Schemas and their meaning: genkernels/ops/rnn.py.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

#include "../dispatch.h"
#include "recurrent.h"
#include "runtime.h"
#include "stats.h"

namespace genkernels {
namespace {

CallCounter forward_calls("rnn_forward"), backward_calls("rnn_backward");

std::tuple<Tensor, Tensor> rnn_forward(Tensor input, Tensor hx, Tensor weight_ih, Tensor weight_hh,
                                       OptionalTensor bias_ih, OptionalTensor bias_hh, OptionalTensor batch_sizes,
                                       OptionalTensor resets, bool reverse) {
  RecurrentArguments arguments(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, resets, reverse, false,
                               1);
  ++forward_calls.calls;
  RecurrentForward call(std::move(arguments), false, 0);
  CallRuntime runtime(call.arguments.operations);
  kernels().rnn_forward(&call.arguments.layer, 1, runtime.get());
  return {call.output, call.h_n};
}

GradientsAndStates rnn_backward(OptionalTensor grad_output, OptionalTensor grad_h_n, Tensor input, Tensor hx,
                                Tensor weight_ih, Tensor weight_hh, OptionalTensor bias_ih, OptionalTensor bias_hh,
                                Tensor output, OptionalTensor batch_sizes, OptionalTensor resets, bool reverse,
                                bool input_grad, bool weight_grad, bool states_grad) {
  RecurrentArguments arguments(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, resets, reverse, false,
                               1);
  ++backward_calls.calls;
  RecurrentBackward call(std::move(arguments), grad_output, grad_h_n, output, {}, 0, input_grad, weight_grad,
                         states_grad);
  CallRuntime runtime(2 * call.arguments.operations);
  kernels().rnn_backward(&call.arguments.layer, &call.grad, 1, runtime.get());
  return std::tuple_cat(call.gradients(), std::tuple(call.grad_states));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  m.impl("rnn_forward", TORCH_BOX(&rnn_forward));
  m.impl("rnn_backward", TORCH_BOX(&rnn_backward));
}

}  // namespace genkernels
