// How often each op's compiled kernel ran.
#pragma once

#include <atomic>
#include <cstdint>

namespace genkernels {

// Declared static, one for each op: constructing it puts it on the list.
struct CallCounter {
  const char* op;
  std::atomic<int64_t> calls{0};
  CallCounter* next;

  explicit CallCounter(const char* name) : op(name), next(first()) { first() = this; }

  static CallCounter*& first() {
    static CallCounter* head = nullptr;
    return head;
  }
};

}  // namespace genkernels
