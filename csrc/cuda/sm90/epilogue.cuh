// Stores the sums of a consumer: rounded, through shared memory, in vectors of 16 bytes.
#pragma once

#include <type_traits>

#include "barriers.cuh"
#include "stable.h"
#if UNIMOE_SM90A
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace unimoe::sm90 {

#if UNIMOE_SM90A

// Two elements side by side; T is BFloat16 or Half.
template <typename T>
__device__ __forceinline__ uint32_t round_pair(float a, float b) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(a, b);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

template <typename T>
__device__ __forceinline__ float2 widen_pair(uint32_t pair) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
  } else {
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  }
}

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }
__device__ __forceinline__ float silu(float x) { return x / (1.f + __expf(-x)); }

// A thread of a consumer: which of the two consumers, and its rows.
struct Consumer {
  int number = threadIdx.x / kWarpgroup - 1;
  int thread = threadIdx.x % kWarpgroup;
  int warp = thread / 32;
  int lane = thread % 32;
  char* staging;

  __device__ explicit Consumer(char* shared)
      : staging(shared + kStagingAt + (threadIdx.x / kWarpgroup - 1) * kStagingBytes) {}

  __device__ void sync() const { sync_consumer(number); }
};

// The output of a consumer's rows: columns of a matrix with rows `stride` elements apart.
struct Target {
  uint16_t* data;
  int64_t stride;
  int row;         // of the consumer's first row
  int end_row;     // rows from here on belong to others
  int column;      // of the first of the columns
  int end_column;  // one past the matrix's last

  __device__ bool holds(int r, int vector) const {
    return row + r < end_row && column + vector * kVectorElements < end_column;
  }
  __device__ uint4* at(int r, int vector) const {
    return reinterpret_cast<uint4*>(data + (row + r) * stride + column + vector * kVectorElements);
  }
};

// Stores 128 columns. `pair(j, half)` gives the two elements at columns 8 * j + 2 * (lane % 4) of
// the upper or lower one of a thread's rows.
template <typename Pair>
__device__ __forceinline__ void store_columns(const Consumer& self, const Target& to, Pair&& pair) {
  constexpr int kVectors = kStagedColumns / kVectorElements;
#pragma unroll
  for (int j = 0; j < kVectors; j += 2) {
    const uint32_t at =
        shared_address(self.staging) +
        swizzled(stored_row(self.warp, self.lane), stored_vector(j, self.lane), kStagedRowBytes);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
                 "r"(pair(j, 0)), "r"(pair(j, 1)), "r"(pair(j + 1, 0)), "r"(pair(j + 1, 1))
                 : "memory");
  }
  self.sync();
#pragma unroll
  for (int i = 0; i < kConsumerRows * kVectors / kWarpgroup; ++i) {
    const int n = i * kWarpgroup + self.thread;
    const int row = n / kVectors, vector = n % kVectors;
    const uint4 value =
        *reinterpret_cast<const uint4*>(self.staging + swizzled(row, vector, kStagedRowBytes));
    if (to.holds(row, vector)) *to.at(row, vector) = value;
  }
  self.sync();
}

// Stores all 256 columns of a consumer's sums.
template <typename T>
__device__ __forceinline__ void store_sums(const Consumer& self, Target to,
                                           const float (&sums)[128]) {
#pragma unroll
  for (int part = 0; part < kTileColumns / kStagedColumns; ++part) {
    store_columns(self, to, [&](int j, int half) {
      const int i = (part * 16 + j) * 4 + 2 * half;
      return round_pair<T>(sums[i], sums[i + 1]);
    });
    to.column += kStagedColumns;
  }
}

#endif

}  // namespace unimoe::sm90
