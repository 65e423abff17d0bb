// PyTorch's threads and memory, handed to a kernel for one call.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <vector>

#include "../kernels/runtime.h"

namespace genkernels {

class CallRuntime {
 public:
  // Opening a parallel region costs microseconds: work of fewer operations than kSerialWork stays on the caller's
  // thread.
  explicit CallRuntime(double operations);
  const Runtime& get() const { return runtime_; }

 private:
  static constexpr double kSerialWork = 1e6;
  static void* allocate(void* owner, size_t bytes);
  static void parallel(int64_t count, void (*task)(void*, int64_t, int64_t), void* argument);
  static void yield();

  std::vector<torch::stable::Tensor> memory_;
  Runtime runtime_;
};

// A new tensor of input's dtype that the kernel writes once and something else reads once. A large one is a fresh
// mapping at every call; in huge pages it costs a tenth of the page faults.
torch::stable::Tensor new_large(const torch::stable::Tensor& input, std::initializer_list<int64_t> sizes);

}  // namespace genkernels
