// Loads of tiles from global into shared memory: by TMA, which writes the 128-byte swizzle, and by
// the threads of a warpgroup, which gather rows and write the same.
#pragma once

#include "barriers.cuh"
#include "tensor_map.h"

namespace unimoe::sm90 {

#if UNIMOE_SM90A

__device__ __forceinline__ void load_box(uint32_t to, const TensorMap& map, uint32_t barrier, int x,
                                         int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}

__device__ __forceinline__ void load_box(uint32_t to, const TensorMap& map, uint32_t barrier, int x,
                                         int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}

__device__ __forceinline__ void load_box(uint32_t to, const TensorMap& map, uint32_t barrier, int x,
                                         int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

// The rows of a tile, each read from the token that it was routed from. Thread t copies vector
// t % 8 of rows t / 8, t / 8 + 16, ...
struct GatheredRows {
  static constexpr int kRowsApart = kWarpgroup / kVectorElements;
  static constexpr int kRows = kTileRows / kRowsApart;
  const char* rows[kRows];
  int inner;

  // Rows past the last one of all are read at it; whatever they give is not stored.
  __device__ GatheredRows(const void* x, const int* order, int first, int num_rows, int top_k,
                          int inner)
      : inner(inner) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = min(first + i * kRowsApart + row_of_thread(), num_rows - 1);
      rows[i] = static_cast<const char*>(x) +
                (static_cast<int64_t>(order[row] / top_k) * inner) * kElementBytes +
                vector_of_thread() * kVectorBytes;
    }
  }

  // Copies columns from `k` on, zeros past the last one, and arrives at the barrier when they are
  // there.
  __device__ void copy(uint32_t to, uint32_t barrier, int k) const {
    const uint32_t at = to + swizzled(row_of_thread(), vector_of_thread(), kBlockRowBytes);
    const bool inside = k + vector_of_thread() * kVectorElements < inner;
    const int bytes = inside ? kVectorBytes : 0;
    const int64_t shift = inside ? static_cast<int64_t>(k) * kElementBytes
                                 : -static_cast<int64_t>(vector_of_thread()) * kVectorBytes;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                       at + i * kRowsApart * kBlockRowBytes),
                   "l"(rows[i] + shift), "r"(bytes)
                   : "memory");
    }
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
  }

 private:
  __device__ static int row_of_thread() { return threadIdx.x % kWarpgroup / kVectorElements; }
  __device__ static int vector_of_thread() { return threadIdx.x % kVectorElements; }
};

#endif

}  // namespace unimoe::sm90
