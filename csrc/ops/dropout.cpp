// genkernels::dropout. Schema and meaning: genkernels/ops/dropout.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../dispatch.h"
#include "checks.h"
#include "runtime.h"
#include "stats.h"
#include "tensors.h"

namespace genkernels {
namespace {

CallCounter calls("dropout");

// What an element's random number takes, in the time of an operation of a product.
constexpr double kOperations = 64;

Tensor dropout(Tensor input_, Tensor seed, double p, std::optional<Tensor> residual_) {
  STD_TORCH_CHECK(p >= 0 && p <= 1, "p: expected a number in [0, 1], got ", p);
  if (residual_) {
    check_like("residual", *residual_, input_);
    const auto sizes = input_.sizes(), others = residual_->sizes();
    STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), others.begin(), others.end()), "residual: expected shape ",
                    shape_string(sizes), ", got ", shape_string(others));
  }
  const Tensor input = as_contiguous(input_);
  const std::optional<Tensor> residual = as_contiguous(residual_);
  DropoutForward forward{};
  forward.dtype = dtype_of(input, true);
  forward.of = dropout_of(p, seed);
  ++calls.calls;
  const Tensor output = new_kept(input, input.sizes());
  forward.size = input.numel();
  if (forward.size == 0) return output;
  forward.input = input.const_data_ptr();
  forward.residual = data(residual);
  forward.output = output.mutable_data_ptr();
  CallRuntime runtime(kOperations * double(forward.size));
  kernels().dropout(forward, runtime.get());
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) { m.impl("dropout", TORCH_BOX(&dropout)); }

}  // namespace genkernels
