#include "runtime.h"

#include <atomic>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace genkernels {
namespace {

// True in a forked process. The threads of PyTorch's pool did not come along, and a parallel region that waits for them
// hangs; whether the parent ever started them cannot be told, so such a process computes on one thread.
std::atomic<bool> is_forked{false};

#if !defined(_WIN32)
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });
#endif

}  // namespace

CallRuntime::CallRuntime(double operations)
    : runtime_{operations >= kSerialWork && !is_forked ? int(torch::stable::get_num_threads()) : 1, parallel, yield,
               allocate, this} {}

void* CallRuntime::allocate(void* owner, size_t bytes) {
  auto& memory = static_cast<CallRuntime*>(owner)->memory_;
  memory.push_back(torch::stable::empty({int64_t(bytes)}, torch::headeronly::ScalarType::Byte));
  return memory.back().mutable_data_ptr();
}

torch::stable::Tensor new_large(const torch::stable::Tensor& input, std::initializer_list<int64_t> sizes) {
  torch::stable::Tensor tensor = torch::stable::new_empty(input, sizes);
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t end = begin + uintptr_t(tensor.numel()) * tensor.element_size();
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  // Whether the system grants it or not, the memory is the same.
  if (first + 8 * kHugePage < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
  return tensor;
}

void CallRuntime::parallel(int64_t count, void (*task)(void*, int64_t, int64_t), void* argument) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) { task(argument, first, last); });
}

void CallRuntime::yield() { std::this_thread::yield(); }

}  // namespace genkernels
