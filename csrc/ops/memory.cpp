#include "memory.h"

#include <torch/csrc/stable/ops.h>

#include <map>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>

// Of torch 2.11 and later; null beside torch 2.10, where what is saved has PyTorch's memory.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* tensor, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);
#endif

namespace genkernels {

using torch::stable::Tensor;

#if defined(__linux__)
namespace {

constexpr size_t kHugePage = 2 << 20;
// More than this is not kept.
constexpr size_t kMostIdle = size_t(1) << 30;

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
  if (found != blocks.idle.end() && found->first <= 2 * bytes) {
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
  madvise(block, size, MADV_FREE);
  blocks.idle.emplace(size, block);
  blocks.idle_bytes += size;
}

void empty_cache() {
  Cache& blocks = cache();
  const std::lock_guard lock(blocks.mutex);
  for (const auto& [size, block] : blocks.idle) munmap(block, size);
  blocks.idle.clear();
  blocks.idle_bytes = 0;
}

Tensor new_saved(const Tensor& input, std::initializer_list<int64_t> sizes) {
  size_t bytes = input.element_size();
  for (const int64_t size : sizes) bytes *= size_t(size);
  void* const block = torch_from_blob != nullptr && bytes >= kLargeBlock ? take_block(bytes) : nullptr;
  if (block == nullptr) return torch::stable::new_empty(input, sizes);
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = strides.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes.begin()[i];
  int32_t dtype;
  aoti_torch_get_dtype(input.get(), &dtype);
  AtenTensorHandle tensor;
  const AOTITorchError error = torch_from_blob(
      block, int64_t(sizes.size()), sizes.begin(), strides.data(), 0, dtype, aoti_torch_device_type_cpu(), -1, &tensor,
      aoti_torch_layout_strided(), nullptr, 0, [](void* data, void*) { return_block(data); }, nullptr);
  if (error != AOTI_TORCH_SUCCESS) {
    return_block(block);
    return torch::stable::new_empty(input, sizes);
  }
  return Tensor(tensor);
}
#else
void* take_block(size_t) { return nullptr; }
void return_block(void*) {}
void empty_cache() {}

Tensor new_saved(const Tensor& input, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(input, sizes);
}
#endif

}  // namespace genkernels
