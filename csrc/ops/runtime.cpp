#include "runtime.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#include <unistd.h>
#endif

#include "memory.h"

namespace genkernels {
namespace {

// True in a forked process. The threads of PyTorch's pool did not come along, and a parallel region that waits for them
// hangs; whether the parent ever started them cannot be told, so such a process computes on one thread.
std::atomic<bool> is_forked{false};

#if !defined(_WIN32)
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });
#endif

int64_t core_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 1 << 20;
}

}  // namespace

CallRuntime::CallRuntime(double operations)
    : runtime_{operations >= kSerialWork && !is_forked ? int(torch::stable::get_num_threads()) : 1,
               core_cache(),
               parallel,
               yield,
               allocate,
               release,
               this} {}

CallRuntime::~CallRuntime() { release(this); }

void CallRuntime::release(void* owner) {
  CallRuntime& call = *static_cast<CallRuntime*>(owner);
  for (void* const block : call.blocks_) return_block(block);
  for (void* const chunk : call.chunks_) ::operator delete(chunk, kAlignment);
  call.blocks_.clear();
  call.chunks_.clear();
  call.free_bytes_ = 0;
}

void* CallRuntime::allocate(void* owner, size_t bytes) {
  CallRuntime& call = *static_cast<CallRuntime*>(owner);
  if (void* const block = bytes >= kLargeBlock ? take_block(bytes) : nullptr) {
    poison(block, bytes);
    return call.blocks_.emplace_back(block);
  }
  bytes = (bytes + 63) / 64 * 64;
  if (bytes > call.free_bytes_) {
    call.free_bytes_ = std::max(bytes, size_t(64) << 10);
    call.free_ = static_cast<std::byte*>(::operator new(call.free_bytes_, kAlignment));
    call.chunks_.push_back(call.free_);
    poison(call.free_, call.free_bytes_);
  }
  void* const memory = call.free_;
  call.free_ += bytes;
  call.free_bytes_ -= bytes;
  return memory;
}

void CallRuntime::parallel(int64_t count, void (*task)(void*, int64_t, int64_t), void* argument) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) { task(argument, first, last); });
}

void CallRuntime::yield() { std::this_thread::yield(); }

}  // namespace genkernels
