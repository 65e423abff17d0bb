#include "runtime.h"

#include <atomic>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
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

CallRuntime::~CallRuntime() {
  for (void* const block : blocks_) return_block(block);
}

void* CallRuntime::allocate(void* owner, size_t bytes) {
  auto& [memory, blocks, runtime] = *static_cast<CallRuntime*>(owner);
  if (void* const block = bytes >= kLargeBlock ? take_block(bytes) : nullptr) return blocks.emplace_back(block);
  memory.push_back(torch::stable::empty({int64_t(bytes)}, torch::headeronly::ScalarType::Byte));
  return memory.back().mutable_data_ptr();
}

void CallRuntime::parallel(int64_t count, void (*task)(void*, int64_t, int64_t), void* argument) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) { task(argument, first, last); });
}

void CallRuntime::yield() { std::this_thread::yield(); }

}  // namespace genkernels
