// Barriers in shared memory between the warpgroup that loads and those that multiply, and the
// position of a block in its ring of stages.
#pragma once

#include "layout.h"

namespace unimoe::sm90 {

#if UNIMOE_SM90A

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Arrives, and has the barrier wait for `bytes` of loads as well.
__device__ __forceinline__ void arrive_and_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "AGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra END;\n"
      "bra AGAIN;\n"
      "END:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Synchronises the 128 threads of one consumer.
__device__ __forceinline__ void sync_consumer(int consumer) {
  asm volatile("bar.sync %0, %1;" ::"r"(1 + consumer), "n"(kWarpgroup) : "memory");
}

// Sets the number of registers of each thread of a warpgroup from here on.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The next stage, with the barriers that signal when it is full and when it is empty.
struct Ring {
  char* shared;
  int stage = 0;
  int parity = 0;

  __device__ explicit Ring(char* shared) : shared(shared) {}
  __device__ uint32_t left() const { return shared_address(shared) + stage * kStageBytes; }
  __device__ uint32_t right() const { return left() + kLeftBytes; }
  __device__ uint32_t full() const { return barrier(stage); }
  __device__ uint32_t empty() const { return barrier(kStages + stage); }
  __device__ uint32_t empty_at(int other) const { return barrier(kStages + other); }
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }

  // By one thread, before any other uses the ring.
  __device__ void init(int producers) const {
    for (int s = 0; s < kStages; ++s) {
      init_barrier(barrier(s), producers);
      init_barrier(barrier(kStages + s), kConsumers);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }

 private:
  __device__ uint32_t barrier(int number) const {
    return shared_address(shared) + kBarriersAt + number * kBarrierBytes;
  }
};

// Number of arrivals at a full barrier: one thread for TMA, or every thread that copies.
constexpr int kTmaProducers = 1;
constexpr int kGatherProducers = 1 + kWarpgroup;

#endif

}  // namespace unimoe::sm90
