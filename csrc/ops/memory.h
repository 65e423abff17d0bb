// Large blocks of memory that are kept from one call to the next. From malloc a block of megabytes is, more often than
// not, a fresh mapping, and its page faults cost a tenth of a training step, of a small one half.
#pragma once

#include <cstddef>

namespace genkernels {

constexpr size_t kLargeBlock = 1 << 20;  // fewer bytes are malloc's

// Uninitialised memory, aligned to a huge page; null where the system has none to give or this build has no such cache.
void* take_block(size_t bytes);

// Keeps the block for the next call: 1 GiB of them at most, of which the system may take all but 64 MiB if memory runs
// short.
void return_block(void* block);

// Hands the blocks that nobody uses back to the system.
void empty_cache();

// For tests: whether memory is handed out full of NaN, so that an element left unwritten is seen.
void poison_memory(bool is_on);
void poison(void* memory, size_t bytes);  // does nothing otherwise

}  // namespace genkernels
