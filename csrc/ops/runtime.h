// PyTorch's threads and memory, handed to a kernel for one call.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

#include "../kernels/runtime.h"

namespace genkernels {

class CallRuntime {
 public:
  // Opening a parallel region costs microseconds: work of fewer operations than kSerialWork stays on the caller's
  // thread.
  explicit CallRuntime(double operations);
  ~CallRuntime();
  CallRuntime(const CallRuntime&) = delete;
  const Runtime& get() const { return runtime_; }

 private:
  static constexpr double kSerialWork = 8e5;
  static void* allocate(void* owner, size_t bytes);
  static void release(void* owner);
  static void parallel(int64_t count, void (*task)(void*, int64_t, int64_t), void* argument);
  static void yield();

  static constexpr std::align_val_t kAlignment{64};
  std::vector<void*> chunks_;  // of memory that small allocations share
  std::byte* free_ = nullptr;  // the last one's rest
  size_t free_bytes_ = 0;
  std::vector<void*> blocks_;
  Runtime runtime_;
};

}  // namespace genkernels
