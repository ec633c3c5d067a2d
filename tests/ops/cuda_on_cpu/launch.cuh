// Runs CUDA kernels on a CPU: stands in for csrc/cuda/launch.cuh, so that tests can run what the
// kernels compute on machines without a GPU. Slow, and says nothing about speed.
//
// A thread of a block is a fiber, and all of them share one thread of the machine. A fiber runs
// until it waits for its warp or its block; who goes next is drawn at random, and some warps are
// held back until the others wait for them, so that a result that hangs on a missing barrier
// differs from run to run. Shared memory starts as garbage.
#pragma once

#include <ucontext.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "check.h"

#define __global__
#define __device__
#define __host__
#define __align__(bytes) alignas(bytes)
#define __launch_bounds__(...)

using std::exp;
using std::log;
using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr unsigned kLanes = 32;
constexpr size_t kStackBytes = 64 * 1024;

[[noreturn]] inline void fail(const char* problem) {
  std::fprintf(stderr, "CUDA on CPU: %s\n", problem);
  std::abort();
}

struct Barrier {
  unsigned live = 0, arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t context;
  dim3 thread;
  unsigned number = 0;
  bool done = false;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackBytes);
};

class Device {
 public:
  void run(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
    const unsigned threads = block.x * block.y * block.z;
    if (threads == 0 || threads > 1024) fail("a block must have 1 to 1024 threads");
    kernel_ = std::move(kernel);
    gridDim = grid;
    blockDim = block;
    while (fibers_.size() < threads) fibers_.emplace_back(std::make_unique<Fiber>());
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y);
        shared_.assign(shared_bytes / sizeof(uint64_t) + 2, 0xfff8a5a5fff8a5a5u);
        run_block(threads);
      }
    }
  }

  void* shared() {
    const auto address = reinterpret_cast<uintptr_t>(shared_.data());
    return reinterpret_cast<void*>((address + 15) / 16 * 16);
  }

  void wait_for_block() { wait(block_); }
  void wait_for_warp() { wait(warps_[current_->number / kLanes]); }

  // What lane `source` of this warp passes as `value`.
  template <typename T>
  T exchange(T value, unsigned source) {
    T all[kLanes];
    collect(value, all);
    return all[source % kLanes];
  }

  template <typename T>
  void collect(T value, T (&all)[kLanes]) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    const unsigned warp = current_->number / kLanes;
    if (warps_[warp].live != kLanes) fail("a full warp is wanted, and lanes are missing");
    std::memcpy(&slots_[warp][lane()], &value, sizeof(T));
    wait_for_warp();
    for (unsigned i = 0; i < kLanes; ++i) std::memcpy(&all[i], &slots_[warp][i], sizeof(T));
    wait_for_warp();
  }

  unsigned lane() const { return current_->number % kLanes; }

 private:
  static void enter();

  void run_block(unsigned threads) {
    block_ = {threads, 0, 0};
    warps_.assign((threads + kLanes - 1) / kLanes, Barrier{});
    slots_.resize(warps_.size());
    std::vector<unsigned> order(threads);
    for (unsigned n = 0; n < threads; ++n) {
      Fiber& fiber = *fibers_[n];
      fiber.number = order[n] = n;
      fiber.done = false;
      fiber.thread = dim3(n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y);
      ++warps_[n / kLanes].live;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Device::enter, 0);
    }
    unsigned left = threads, held = 0;
    progress_ = true;
    while (left > 0) {
      const bool stuck = !progress_;
      progress_ = false;
      if (random_() % 16 == 0) held = random_();
      if (stuck) held = 0;
      std::shuffle(order.begin(), order.end(), random_);
      for (const unsigned n : order) {
        Fiber& fiber = *fibers_[n];
        if (fiber.done || (held >> n / kLanes & 1) != 0) continue;
        current_ = &fiber;
        threadIdx = fiber.thread;
        swapcontext(&scheduler_, &fiber.context);
        if (!fiber.done) continue;
        progress_ = true;
        --left;
        leave(block_);
        leave(warps_[n / kLanes]);
      }
      if (!progress_ && stuck) fail("threads wait for one another at different barriers");
    }
  }

  void wait(Barrier& barrier) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == barrier.live) return open(barrier);
    Fiber* self = current_;
    while (barrier.generation == generation) {
      swapcontext(&self->context, &scheduler_);
    }
  }

  void leave(Barrier& barrier) {
    if (--barrier.live > 0 && barrier.arrived == barrier.live) open(barrier);
  }

  void open(Barrier& barrier) {
    barrier.arrived = 0;
    ++barrier.generation;
    progress_ = true;
  }

  std::function<void()> kernel_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Barrier> warps_;
  std::vector<std::array<uint64_t, kLanes>> slots_;
  std::vector<uint64_t> shared_;
  Barrier block_;
  ucontext_t scheduler_;
  Fiber* current_ = nullptr;
  bool progress_ = false;
  std::mt19937 random_{1};
};

inline Device device;

inline void Device::enter() {
  device.kernel_();
  device.current_->done = true;
}

}  // namespace emulation

inline void __syncthreads() { emulation::device.wait_for_block(); }
inline void __syncwarp() { emulation::device.wait_for_warp(); }
inline void __threadfence() {}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int step) {
  return emulation::device.exchange(value, emulation::device.lane() ^ step);
}

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return emulation::device.exchange(value, source);
}

template <typename T>
T __shfl_up_sync(unsigned, T value, int step) {
  const int lane = emulation::device.lane();
  return emulation::device.exchange(value, lane >= step ? lane - step : lane);
}

template <typename T>
T __shfl_down_sync(unsigned, T value, int step) {
  const int lane = emulation::device.lane();
  return emulation::device.exchange(value, lane + step < 32 ? lane + step : lane);
}

inline unsigned __match_any_sync(unsigned, int value) {
  int all[emulation::kLanes];
  emulation::device.collect(value, all);
  unsigned peers = 0;
  for (unsigned i = 0; i < emulation::kLanes; ++i) peers |= unsigned(all[i] == value) << i;
  return peers;
}

inline unsigned __ballot_sync(unsigned, bool value) {
  int all[emulation::kLanes];
  emulation::device.collect(static_cast<int>(value), all);
  unsigned lanes = 0;
  for (unsigned i = 0; i < emulation::kLanes; ++i) lanes |= unsigned(all[i] != 0) << i;
  return lanes;
}

inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }

inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}

namespace unimoe {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int64_t kSharedBytes = 48 * 1024;
constexpr int64_t kMostSharedBytes = 99 * 1024;
constexpr int64_t kFixedSharedBytes = 1024;

template <typename Integer>
constexpr Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
};

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), LaunchShape shape, const Tensor&,
            Arguments... arguments) {
  UNIMOE_CHECK(shape.shared_bytes <= static_cast<size_t>(kMostSharedBytes),
               "too much shared memory");
  if (shape.grid.x == 0 || shape.grid.y == 0) return;
  emulation::device.run(shape.grid, shape.block, shape.shared_bytes,
                        [=] { kernel(static_cast<Parameters>(arguments)...); });
}

}  // namespace unimoe
