// Stable counting sort of expert ids without host synchronisation, in one launch for few ids, else
// in two: a histogram of each block's ids, and the sort, in which every block adds up the
// histograms of the blocks before it. Atomics are used only in shared memory, on integers.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "launch.cuh"
#include "routed_rows.h"

namespace unimoe {
namespace {

constexpr int64_t kMaxWarps = 32;
constexpr int kMaxThreads = kMaxWarps * kWarp;
constexpr int kIdsPerLane = 4;  // that a thread loads at a time
constexpr int64_t kIdsPerWarp = kIdsPerLane * kWarp;
// What one block sorts alone, in the ids that its warps take at a time: not longer than another
// launch would take.
constexpr int64_t kTilesAlone = 2;
// Each block reads the counts of all blocks, so their number must not grow with the number of ids.
constexpr int64_t kMaxBlocks = 256;
constexpr int kBatch = 8;  // counts that a thread waits for at a time

// Sentinels and all other ids that are not those of an expert belong to the last bucket.
template <typename Id>
__device__ int bucket_of(Id id, int num_experts) {
  using Unsigned = std::make_unsigned_t<Id>;
  return static_cast<int>(min(static_cast<Unsigned>(id), static_cast<Unsigned>(num_experts)));
}

// The ids of a block: `tiles` times as many as its threads load at a time.
struct Share {
  int64_t first, last, step;

  __device__ Share(int64_t rows, int tiles) {
    step = static_cast<int64_t>(blockDim.x) * kIdsPerLane;
    first = blockIdx.x * tiles * step;
    last = min(first + tiles * step, rows);
  }
};

// What a thread holds of a tile: of its warp's ids, in order, every 32nd.
struct Tile {
  int64_t first;
  int buckets[kIdsPerLane];

  // Lanes past the end get a bucket that no id has.
  template <typename Id>
  __device__ Tile(const Id* __restrict__ ids, int64_t start, int64_t last, int num_experts) {
    first = start + threadIdx.x / kWarp * kIdsPerWarp + threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kIdsPerLane; ++i) {
      buckets[i] = row(i) < last ? bucket_of(ids[row(i)], num_experts) : num_experts + 1;
    }
  }

  __device__ int64_t row(int i) const { return first + i * kWarp; }
};

__device__ unsigned lanes_below() { return (1u << threadIdx.x % kWarp) - 1; }

// Adds the block's ids to `histogram`.
template <typename Id>
__device__ void count_ids(const Id* __restrict__ ids, const Share& share, int num_experts,
                          int* histogram) {
  for (int64_t start = share.first; start < share.last; start += share.step) {
    const Tile tile(ids, start, share.last, num_experts);
#pragma unroll
    for (int i = 0; i < kIdsPerLane; ++i) {
      const int bucket = tile.buckets[i];
      const unsigned peers = __match_any_sync(kFullWarp, bucket);
      // One lane adds for all lanes with the same bucket, because all ids may be equal.
      if (bucket <= num_experts && (peers & lanes_below()) == 0) {
        atomicAdd(&histogram[bucket], __popc(peers));
      }
    }
  }
  __syncthreads();
}

__device__ void clear(int* values, int size) {
  for (int i = threadIdx.x; i < size; i += blockDim.x) values[i] = 0;
  __syncthreads();
}

// counts [blocks, buckets]
template <typename Id>
__global__ void __launch_bounds__(kMaxThreads)
    count_kernel(const Id* __restrict__ ids, int* __restrict__ counts, int64_t rows, int tiles,
                 int num_experts) {
  extern __shared__ int histogram[];
  const int buckets = num_experts + 1;
  clear(histogram, buckets);
  count_ids(ids, Share(rows, tiles), num_experts, histogram);
  for (int b = threadIdx.x; b < buckets; b += blockDim.x) {
    counts[static_cast<int64_t>(blockIdx.x) * buckets + b] = histogram[b];
  }
}

// Adds to each bucket's sum its counts of the first `blocks` blocks. Groups of threads share the
// blocks; `partial` has room for as many sums of every bucket as there are warps.
__device__ void add_counts(const int* __restrict__ counts, int blocks, int buckets, int* partial,
                           int* sums) {
  const int threads = blockDim.x, group = threadIdx.x / buckets;
  const int groups = max(1, min(threads / buckets, threads / kWarp));
  if (group < groups) {
    for (int b = threadIdx.x - group * buckets; b < buckets; b += threads) {
      int sum = 0;
#pragma unroll kBatch
      for (int block = group; block < blocks; block += groups) {
        sum += counts[static_cast<int64_t>(block) * buckets + b];
      }
      partial[group * buckets + b] = sum;
    }
  }
  __syncthreads();
  for (int b = threadIdx.x; b < buckets; b += threads) {
    for (int g = 0; g < groups; ++g) sums[b] += partial[g * buckets + b];
  }
  __syncthreads();
}

// Inclusive sum over the threads of a block.
__device__ int block_inclusive_sum(int value) {
  __shared__ int warp_totals[kMaxWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int step = 1; step < kWarp; step *= 2) {
    const int below = __shfl_up_sync(kFullWarp, value, step);
    if (lane >= step) value += below;
  }
  if (lane == kWarp - 1) warp_totals[warp] = value;
  __syncthreads();
  for (int w = 0; w < warp; ++w) value += warp_totals[w];
  __syncthreads();  // the totals are free for the next call
  return value;
}

// Turns the totals of the buckets into their exclusive sum; the first block writes both.
__device__ void scan_totals(int* totals, int buckets, int* __restrict__ tokens_per_expert,
                            int* __restrict__ expert_offsets) {
  const int threads = blockDim.x;
  int carry = 0;  // of buckets before these
  for (int first = 0; first < buckets; first += threads) {
    const int b = first + threadIdx.x;
    const int total = b < buckets ? totals[b] : 0;
    const int offset = carry + block_inclusive_sum(total) - total;
    if (b < buckets) {
      totals[b] = offset;
      if (blockIdx.x == 0) expert_offsets[b] = offset;
      if (blockIdx.x == 0 && b < buckets - 1) tokens_per_expert[b] = total;
    }
    __shared__ int end;
    if (static_cast<int>(threadIdx.x) == threads - 1) end = offset + total;
    __syncthreads();
    carry = end;
    __syncthreads();
  }
}

// Sorts the block's ids. `counts` is null where it has them all.
template <typename Id>
__global__ void __launch_bounds__(kMaxThreads)
    sort_kernel(const Id* __restrict__ ids, const int* __restrict__ counts,
                int* __restrict__ row_order, int* __restrict__ inverse_order,
                int* __restrict__ tokens_per_expert, int* __restrict__ expert_offsets, int64_t rows,
                int tiles, int num_experts) {
  extern __shared__ int shared[];
  const int buckets = num_experts + 1, warps = blockDim.x / kWarp;
  int* next = shared;                // of each bucket, where its next row goes
  int* histograms = next + buckets;  // [warps, buckets]
  int* own = histograms + threadIdx.x / kWarp * buckets;
  const Share share(rows, tiles);
  clear(next, buckets);
  if (counts == nullptr) {
    count_ids(ids, share, num_experts, next);
  } else {
    add_counts(counts, gridDim.x, buckets, histograms, next);
  }
  scan_totals(next, buckets, tokens_per_expert, expert_offsets);
  if (counts != nullptr) add_counts(counts, blockIdx.x, buckets, histograms, next);

  for (int64_t start = share.first; start < share.last; start += share.step) {
    for (int b = threadIdx.x % kWarp; b < buckets; b += kWarp) own[b] = 0;
    const Tile tile(ids, start, share.last, num_experts);
    int ranks[kIdsPerLane];  // among the rows of the bucket in the warp's part of the tile
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kIdsPerLane; ++i) {
      const int bucket = tile.buckets[i];
      const unsigned peers = __match_any_sync(kFullWarp, bucket);
      const int earlier = bucket < buckets ? own[bucket] : 0;
      __syncwarp();
      if (bucket < buckets && (peers & lanes_below()) == 0) own[bucket] = earlier + __popc(peers);
      __syncwarp();
      ranks[i] = earlier + __popc(peers & lanes_below());
    }
    __syncthreads();
    // Of each bucket, where the rows of every warp start.
    for (int b = threadIdx.x; b < buckets; b += blockDim.x) {
      int position = next[b];
      for (int warp = 0; warp < warps; warp += kBatch) {
        // All loads precede the first store, because the compiler must assume that they alias.
        int batch[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          batch[i] = warp + i < warps ? histograms[(warp + i) * buckets + b] : 0;
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (warp + i < warps) histograms[(warp + i) * buckets + b] = position;
          position += batch[i];
        }
      }
      next[b] = position;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kIdsPerLane; ++i) {
      if (tile.buckets[i] >= buckets) continue;
      const int position = own[tile.buckets[i]] + ranks[i];
      row_order[position] = static_cast<int>(tile.row(i));
      inverse_order[tile.row(i)] = position;
    }
    __syncwarp();  // the next tile clears what lanes read
  }
}

// Threads and blocks: as many warps as have work and room in shared memory for their histograms.
struct SortShape {
  int64_t warps, tiles, blocks;

  SortShape(int64_t rows, int64_t buckets) {
    const int64_t fit =
        std::max(warps_within(kSharedBytes, buckets),
                 std::min<int64_t>(kMaxWarps / 2, warps_within(kMostSharedBytes, buckets)));
    const int64_t busy = std::max(ceil_div(rows, kIdsPerWarp), ceil_div<int64_t>(buckets, kWarp));
    warps = std::min({fit, busy, kMaxWarps});
    const int64_t step = warps * kIdsPerWarp;
    const bool alone = rows <= kTilesAlone * step;
    tiles = std::max<int64_t>(1, ceil_div(rows, step * (alone ? 1 : kMaxBlocks)));
    blocks = std::max<int64_t>(1, ceil_div(rows, step * tiles));
  }

  // `next` and a histogram a warp.
  static int64_t bytes(int64_t warps, int64_t buckets) {
    return (warps + 1) * buckets * static_cast<int64_t>(sizeof(int));
  }

  static int64_t warps_within(int64_t room, int64_t buckets) {
    return (room - kFixedSharedBytes) / bytes(0, buckets) - 1;
  }
};

template <typename Id>
void sort_ids(const Tensor& ids, int64_t num_experts, const gpu::Sorted& out) {
  const auto& [row_order, inverse_order, tokens_per_expert, expert_offsets] = out;
  const int64_t rows = ids.size(0), buckets = num_experts + 1;
  const SortShape sizes(rows, buckets);
  LaunchShape shape{dim3(static_cast<unsigned>(sizes.blocks)),
                    dim3(static_cast<unsigned>(sizes.warps * kWarp))};
  const int* counted = nullptr;
  std::optional<Tensor> counts;
  if (sizes.blocks > 1) {
    counts = empty({sizes.blocks, buckets}, ScalarType::Int, ids);
    counted = const_data<int>(*counts);
    shape.shared_bytes = SortShape::bytes(0, buckets);
    launch(count_kernel<Id>, shape, ids, const_data<Id>(ids), mutable_data<int>(*counts), rows,
           sizes.tiles, num_experts);
  }
  shape.shared_bytes = SortShape::bytes(sizes.warps, buckets);
  launch(sort_kernel<Id>, shape, ids, const_data<Id>(ids), counted, mutable_data<int>(row_order),
         mutable_data<int>(inverse_order), mutable_data<int>(tokens_per_expert),
         mutable_data<int>(expert_offsets), rows, sizes.tiles, num_experts);
}

}  // namespace

gpu::Sorted gpu::expert_sort(Tensor ids, int64_t num_experts) {
  check_ids_vector(ids, "ids");
  const int64_t rows = ids.size(0);
  const int64_t largest = (kMostSharedBytes - kFixedSharedBytes) / SortShape::bytes(1, 1) - 1;
  UNIMOE_CHECK(num_experts >= 1 && num_experts <= largest, "num_experts (", num_experts,
               ") must be between 1 and ", largest);
  UNIMOE_CHECK(rows <= std::numeric_limits<int32_t>::max(), "ids (", rows,
               " rows) must have fewer than 2^31");
  const auto make = [&](int64_t size) { return empty({size}, ScalarType::Int, ids); };
  const Sorted out{make(rows), make(rows), make(num_experts), make(num_experts + 1)};
  if (ids.scalar_type() == ScalarType::Long) {
    sort_ids<int64_t>(ids, num_experts, out);
  } else {
    sort_ids<int>(ids, num_experts, out);
  }
  return out;
}

}  // namespace unimoe

STABLE_TORCH_LIBRARY_IMPL(unimoe, CUDA, m) {
  m.impl("expert_sort", TORCH_BOX(&unimoe::gpu::expert_sort));
}
