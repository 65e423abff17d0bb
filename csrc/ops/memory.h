// Large blocks of memory that are kept from one call to the next. A block of tens of megabytes from malloc is a fresh
// mapping every time, and its page faults cost a tenth of a whole training step.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <initializer_list>

namespace genkernels {

// Blocks of fewer bytes come back from malloc with their pages.
constexpr size_t kLargeBlock = 4 << 20;

// Uninitialised memory, aligned to a huge page; null where the system has none to give or this build has no such cache.
void* take_block(size_t bytes);

// Keeps the block for the next call. The system may take its pages if memory runs short.
void return_block(void* block);

// Hands the blocks that nobody uses back to the system.
void empty_cache();

// A tensor of input's dtype for what one op saves for another; its memory is kept when it is freed. Not for results:
// users may resize those.
torch::stable::Tensor new_saved(const torch::stable::Tensor& input, std::initializer_list<int64_t> sizes);

}  // namespace genkernels
