// genkernels::gru_gates_forward and gru_gates_backward on GPUs. Schemas and their meaning: genkernels/ops/gru.py.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "../ops/checks.h"
#include "../ops/stats.h"
#include "gru_cell.h"

namespace genkernels::cuda {

const int kArchitectures[] = {__CUDA_ARCH_LIST__, 0};

namespace {

CallCounter forward_calls("gru_gates_forward"), backward_calls("gru_gates_backward");

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1 << 16;  // more than run at a time on any GPU; beyond, threads do several groups

// Two blocks at a time leave each thread 128 registers: where the compiler chose how many for itself, it spilled.
template <int kWidth, class Step>
__global__ void __launch_bounds__(kThreads, 2) gru_gates(const Step step) {
  compute_share<kWidth>(step, int64_t(blockIdx.x) * kThreads + threadIdx.x, int64_t(gridDim.x) * kThreads);
}

template <int kWidth, class Step>
void launch(const Step& step, cudaStream_t stream) {
  const int64_t blocks = (step.B * (step.H / kWidth) + kThreads - 1) / kThreads;
  gru_gates<kWidth><<<unsigned(std::min(blocks, kMostBlocks)), kThreads, 0, stream>>>(step);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
}

// In turn with what else the current stream of hx's device has to do.
template <class S, template <class> class Step>
void run(const Step<S>& step, const Tensor& hx) {
  if (step.B == 0 || step.H == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(hx.get_device_index());
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(hx.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
                  "CUDA: no current stream");
  constexpr int kWidth = 16 / sizeof(S);
  if (step.takes(kWidth))
    launch<kWidth>(step, static_cast<cudaStream_t>(stream));
  else
    launch<1>(step, static_cast<cudaStream_t>(stream));
}

// Calls `work` with a number of hx's type.
template <class Work>
void with_type_of(const Tensor& hx, const Work& work) {
  switch (hx.scalar_type()) {
    case ScalarType::Float: return work(float());
    case ScalarType::Double: return work(double());
    case ScalarType::Half: return work(torch::headeronly::Half());
    case ScalarType::BFloat16: return work(torch::headeronly::BFloat16());
    default: STD_TORCH_CHECK(false, "hx: expected dtype float32, float64, float16 or bfloat16");
  }
}

Tensor checked(const char* name, const Tensor& tensor, const Tensor& hx, int64_t columns) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == hx.get_device_index() &&
                      tensor.scalar_type() == hx.scalar_type(),
                  name, ": expected hx's device and dtype");
  check_shape(name, tensor, {hx.size(0), columns});
  return as_contiguous(tensor);
}

Tensor new_rows(const Tensor& hx, int64_t columns) { return torch::stable::new_empty(hx, {hx.size(0), columns}); }

template <class S>
const S* data(const Tensor& tensor) {
  return static_cast<const S*>(tensor.const_data_ptr());
}

template <class S>
S* mutable_data(const Tensor& tensor) {
  return static_cast<S*>(tensor.mutable_data_ptr());
}

std::tuple<Tensor, Tensor> gru_gates_forward(Tensor projected, Tensor recurrent, Tensor hx, bool save_gates) {
  STD_TORCH_CHECK(hx.dim() == 2, "hx: expected 2 dimensions, got ", hx.dim());
  const int64_t B = hx.size(0), H = hx.size(1);
  projected = checked("projected", projected, hx, 3 * H);
  recurrent = checked("recurrent", recurrent, hx, 3 * H);
  hx = checked("hx", hx, hx, H);
  const Tensor output = new_rows(hx, H);
  const Tensor gates = save_gates ? new_rows(hx, 4 * H) : torch::stable::new_empty(hx, {0});
  ++forward_calls.calls;
  with_type_of(hx, [&](auto number) {
    using S = decltype(number);
    S* const saved = save_gates ? mutable_data<S>(gates) : nullptr;
    run(GatesForward<S>{B, H, data<S>(projected), data<S>(recurrent), data<S>(hx), mutable_data<S>(output), saved}, hx);
  });
  return {output, gates};
}

std::tuple<Tensor, Tensor> gru_gates_backward(Tensor grad_output, Tensor gates, Tensor hx) {
  STD_TORCH_CHECK(hx.dim() == 2, "hx: expected 2 dimensions, got ", hx.dim());
  const int64_t B = hx.size(0), H = hx.size(1);
  grad_output = checked("grad_output", grad_output, hx, H);
  gates = checked("gates", gates, hx, 4 * H);
  hx = checked("hx", hx, hx, H);
  const Tensor deltas = new_rows(hx, 4 * H), grad_hx = new_rows(hx, H);
  ++backward_calls.calls;
  with_type_of(hx, [&](auto number) {
    using S = decltype(number);
    run(GatesBackward<S>{B, H, data<S>(grad_output), data<S>(gates), data<S>(hx), mutable_data<S>(deltas),
                         mutable_data<S>(grad_hx)},
        hx);
  });
  return {deltas, grad_hx};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genkernels, CUDA, m) {
  m.impl("gru_gates_forward", TORCH_BOX(&gru_gates_forward));
  m.impl("gru_gates_backward", TORCH_BOX(&gru_gates_backward));
}

}  // namespace genkernels::cuda
