// What all matmuls for compute capability 9.0 share: the table of row tiles, and the walk of a
// consumer along the depth of a tile.
#pragma once

#include "epilogue.cuh"
#include "tile_schedule.h"
#include "tma.cuh"
#include "wgmma.cuh"

namespace unimoe::sm90 {

// How the right operand lies: as [columns, depth], or as [depth, columns].
enum class Weight { kAlongDepth, kAcrossDepth };

#if UNIMOE_SM90A

// Registers of a thread, of 65536 over 384 threads. Who gathers keeps eight addresses.
template <bool kGathers>
struct Registers {
  static constexpr int kProducer = kGathers ? 56 : 40;
  static constexpr int kConsumer = kGathers ? 224 : 232;
  static_assert(kWarpgroup * (kProducer + kConsumers * kConsumer) <= 65536);
};

// Counts, by one warp, the row tiles of the experts before each.
__device__ __forceinline__ void count_row_tiles(const int* offsets, int experts,
                                                int* tiles_before) {
  const int lane = threadIdx.x % 32;
  int total = 0;
  for (int first = 0; first < experts; first += 32) {
    const int e = first + lane;
    int tiles = e < experts ? tiles_of(offsets[e + 1] - offsets[e], kTileRows) : 0;
    for (int step = 1; step < 32; step *= 2) {
      const int below = __shfl_up_sync(~0u, tiles, step);
      if (lane >= step) tiles += below;
    }
    if (e < experts) tiles_before[e + 1] = total + tiles;
    total += __shfl_sync(~0u, tiles, 31);
  }
  if (lane == 0) tiles_before[0] = 0;
}

// Loads what a stage has of an expert's weight.
template <Weight kWeight>
__device__ __forceinline__ void load_weight(const Ring& ring, const TensorMap& map, int expert,
                                            int k, int column, int second_column) {
  if constexpr (kWeight == Weight::kAlongDepth) {
    load_box(ring.right(), map, ring.full(), k, column, expert);
    load_box(ring.right() + kRightBytes / 2, map, ring.full(), k, second_column, expert);
  } else {
#pragma unroll
    for (int i = 0; i < kTileColumns / kBlockColumns; ++i) {
      load_box(ring.right() + i * kBlockBytes, map, ring.full(), column + i * kBlockColumns, k,
               expert);
    }
  }
}

// Sums the products of one tile over `steps` stages. A stage is given back when the products after
// it are under way.
template <typename T, bool kGathers, int kLeftAcross, int kRightAcross>
__device__ __forceinline__ void sum_products(const Consumer& self, Ring& ring, int steps,
                                             float (&sums)[kSums]) {
  int last = -1;
  for (int k = 0; k < steps; ++k) {
    wait(ring.full(), ring.parity);
    // What threads wrote is not seen by wgmma before such a fence.
    if constexpr (kGathers) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    const uint32_t left = ring.left() + self.number * kBlockBytes, right = ring.right();
    begin_products();
#pragma unroll
    for (int i = 0; i < kTileDepth / kStepDepth; ++i) {
      multiply<T, kLeftAcross, kRightAcross>(
          sums, kLeftAcross ? across_depth(left, i) : along_depth(left, i),
          kRightAcross ? across_depth(right, i) : along_depth(right, i), k + i > 0);
    }
    end_products<1>();
    if (last >= 0 && self.thread == 0) arrive(ring.empty_at(last));
    last = ring.stage;
    ring.advance();
  }
  wait_for_products();
  if (last >= 0 && self.thread == 0) arrive(ring.empty_at(last));
}

#endif

}  // namespace unimoe::sm90
