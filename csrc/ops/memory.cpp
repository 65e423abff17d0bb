#include "memory.h"

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace genkernels {

namespace {

std::atomic<bool> is_poisoned{false};

}  // namespace

void poison_memory(bool is_on) { is_poisoned = is_on; }

void poison(void* memory, size_t bytes) {
  if (is_poisoned) std::memset(memory, 0xff, bytes);
}

#if defined(__linux__)
namespace {

constexpr size_t kHugePage = 2 << 20;
// More than this is not kept, and the system may take the pages of what is above the first limit: to offer them costs 5
// microseconds a megabyte.
constexpr size_t kMostIdle = size_t(1) << 30, kFirmlyIdle = size_t(64) << 20;

struct Cache {
  std::mutex mutex;
  std::map<void*, size_t> used;
  std::multimap<size_t, void*> idle;
  size_t idle_bytes = 0;
};

// Never destroyed: tensors may be freed after the last static object.
Cache& cache() {
  static Cache* const instance = new Cache;
  return *instance;
}

// A process forked while another thread holds the mutex would wait for it for ever.
[[maybe_unused]] const int registered =
    pthread_atfork([] { cache().mutex.lock(); }, [] { cache().mutex.unlock(); }, [] { cache().mutex.unlock(); });

// A mapping aligned to a huge page, so that it consists of them where the system allows it.
void* map(size_t bytes) {
  void* const mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(mapped);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  if (first != begin) munmap(mapped, first - begin);
  if (first != begin + kHugePage) munmap(reinterpret_cast<void*>(first + bytes), begin + kHugePage - first);
  madvise(reinterpret_cast<void*>(first), bytes, MADV_HUGEPAGE);
  return reinterpret_cast<void*>(first);
}

}  // namespace

void* take_block(size_t bytes) {
  bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  Cache& blocks = cache();
  const std::lock_guard lock(blocks.mutex);
  const auto found = blocks.idle.lower_bound(bytes);
  if (found != blocks.idle.end() && found->first - bytes <= bytes / 4) {
    const auto [size, block] = *found;
    blocks.idle.erase(found);
    blocks.idle_bytes -= size;
    blocks.used.emplace(block, size);
    return block;
  }
  void* const block = map(bytes);
  if (block != nullptr) blocks.used.emplace(block, bytes);
  return block;
}

void return_block(void* block) {
  Cache& blocks = cache();
  const std::lock_guard lock(blocks.mutex);
  const auto found = blocks.used.find(block);
  const size_t size = found->second;
  blocks.used.erase(found);
  if (blocks.idle_bytes + size > kMostIdle) {
    munmap(block, size);
    return;
  }
  if (blocks.idle_bytes + size > kFirmlyIdle) madvise(block, size, MADV_FREE);
  blocks.idle.emplace_hint(blocks.idle.lower_bound(size), size, block);  // the last one comes first, from the cache
  blocks.idle_bytes += size;
}

void empty_cache() {
  Cache& blocks = cache();
  const std::lock_guard lock(blocks.mutex);
  for (const auto& [size, block] : blocks.idle) munmap(block, size);
  blocks.idle.clear();
  blocks.idle_bytes = 0;
}

#else
void* take_block(size_t) { return nullptr; }
void return_block(void*) {}
void empty_cache() {}
#endif

}  // namespace genkernels
