// Distribution of tasks over threads, and buffers that are kept between calls.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <thread>

#include "check.h"

namespace unimoe {

constexpr int64_t kAlignment = 64;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Uninitialised memory that is aligned to a cache line.
inline std::unique_ptr<uint32_t, Free> allocate(int64_t units) {
  const int64_t bytes =
      (std::max<int64_t>(1, units) * 4 + kAlignment - 1) / kAlignment * kAlignment;
  void* memory = std::aligned_alloc(kAlignment, bytes);
  UNIMOE_CHECK(memory != nullptr, "out of memory: ", bytes, " bytes for packed operands");
  return std::unique_ptr<uint32_t, Free>(static_cast<uint32_t*>(memory));
}

// Memory that is kept for the next call, and grows.
class Scratch {
 public:
  uint32_t* at_least(int64_t units) {
    if (held_ < units) {
      memory_.reset();
      held_ = 0;
      memory_ = allocate(units);
      held_ = units;
    }
    return memory_.get();
  }

  void shrink_to(int64_t units) {
    if (held_ > units) {
      memory_.reset();
      held_ = 0;
    }
  }

 private:
  std::unique_ptr<uint32_t, Free> memory_;
  int64_t held_ = 0;
};

// Waits until a counter that other threads decrement is zero, or one of them has failed.
inline void wait_for(const std::atomic<int64_t>& number, const std::atomic<bool>& failed) {
  while (number.load(std::memory_order_acquire) != 0 && !failed) std::this_thread::yield();
}

// Every thread takes the next task until none is left, because tasks may differ a lot in size.
template <typename Body>
void for_each_task(int64_t tasks, Body&& body) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < tasks; task = next++) body(task);
  });
}

// The same for a task that needs to know which task its thread runs next; `tasks` if that is not
// decided yet: the last ones go to the first free thread.
template <typename Body>
void for_each_task_and_next(int64_t tasks, Body&& body) {
  constexpr int64_t kLast = 8;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < tasks;) {
      const bool known = next.load() < tasks - kLast;
      const int64_t then = known ? next++ : tasks;
      body(task, then);
      task = known ? then : next++;
    }
  });
}

}  // namespace unimoe
