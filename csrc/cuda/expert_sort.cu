// Stable counting sort of expert ids, in three launches and without a host synchronisation:
// a histogram of each chunk of ids, an exclusive scan over (expert, chunk), and the scatter.
// One warp owns a chunk and walks it in order. The only atomics are integer, on counts.
#include <limits>

#include "launch.cuh"
#include "routed_rows.h"

namespace unimoe {
namespace {

constexpr int kIdsPerChunk = 512;
constexpr int kMaxChunks = 256;
constexpr int kWarpsPerBlock = 4;
constexpr int kScanThreads = 1024;
constexpr int kScanBatch = 16;  // counts that a thread waits for at a time

// Sentinels, and any id that is not an expert's, go to the last bucket.
__device__ int bucket_of(int id, int num_experts) {
  return static_cast<int>(min(static_cast<unsigned>(id), static_cast<unsigned>(num_experts)));
}

// counts [chunks, buckets]
__global__ void count_kernel(const int* __restrict__ ids, int* __restrict__ counts, int rows,
                             int chunk_rows, int chunks, int num_experts) {
  extern __shared__ int shared[];
  const int buckets = num_experts + 1;
  int* histogram = shared + threadIdx.y * buckets;
  const int chunk = blockIdx.x * blockDim.y + threadIdx.y;
  if (chunk >= chunks) return;
  for (int b = threadIdx.x; b < buckets; b += kWarp) histogram[b] = 0;
  __syncwarp();
  const int64_t first = static_cast<int64_t>(chunk) * chunk_rows;
  const int64_t last = min(first + chunk_rows, static_cast<int64_t>(rows));
  for (int64_t n = first + threadIdx.x; n < last; n += kWarp) {
    atomicAdd(&histogram[bucket_of(ids[n], num_experts)], 1);
  }
  __syncwarp();
  for (int b = threadIdx.x; b < buckets; b += kWarp) {
    counts[static_cast<int64_t>(chunk) * buckets + b] = histogram[b];
  }
}

// Inclusive sum over the threads of a block of kScanThreads.
__device__ int block_inclusive_sum(int value) {
  __shared__ int warp_totals[kScanThreads / kWarp];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  for (int step = 1; step < kWarp; step *= 2) {
    const int below = __shfl_up_sync(kFullWarp, value, step);
    if (lane >= step) value += below;
  }
  if (lane == kWarp - 1) warp_totals[warp] = value;
  __syncthreads();
  if (warp == 0) {
    int total = warp_totals[lane];
    for (int step = 1; step < kWarp; step *= 2) {
      const int below = __shfl_up_sync(kFullWarp, total, step);
      if (lane >= step) total += below;
    }
    warp_totals[lane] = total;
  }
  __syncthreads();
  if (warp > 0) value += warp_totals[warp - 1];
  __syncthreads();  // the totals are free for the next call
  return value;
}

// Turns counts [chunks, buckets] into the number of earlier rows of the same bucket, and writes
// the totals and their exclusive sum. One block; a thread owns a bucket.
__global__ void __launch_bounds__(kScanThreads)
    scan_kernel(int* __restrict__ counts, int* __restrict__ tokens_per_expert,
                int* __restrict__ expert_offsets, int chunks, int num_experts) {
  const int buckets = num_experts + 1;
  __shared__ int carry;
  if (threadIdx.x == 0) carry = 0;
  __syncthreads();
  for (int first = 0; first < buckets; first += kScanThreads) {
    const int bucket = first + threadIdx.x;
    int total = 0;
    if (bucket < buckets) {
      int* slots = counts + bucket;
      for (int chunk = 0; chunk < chunks; chunk += kScanBatch) {
        // All loads before the first store, which might change what is loaded for all that the
        // compiler knows.
        int batch[kScanBatch];
#pragma unroll
        for (int i = 0; i < kScanBatch; ++i) {
          const int64_t at = static_cast<int64_t>(chunk + i) * buckets;
          batch[i] = chunk + i < chunks ? slots[at] : 0;
        }
#pragma unroll
        for (int i = 0; i < kScanBatch; ++i) {
          if (chunk + i < chunks) slots[static_cast<int64_t>(chunk + i) * buckets] = total;
          total += batch[i];
        }
      }
    }
    const int inclusive = block_inclusive_sum(total);
    if (bucket < buckets) expert_offsets[bucket] = carry + inclusive - total;
    if (bucket < num_experts) tokens_per_expert[bucket] = total;
    __syncthreads();
    if (threadIdx.x == kScanThreads - 1) carry += inclusive;
    __syncthreads();
  }
}

__global__ void scatter_kernel(const int* __restrict__ ids, const int* __restrict__ counts,
                               const int* __restrict__ expert_offsets, int* __restrict__ row_order,
                               int* __restrict__ inverse_order, int rows, int chunk_rows,
                               int chunks, int num_experts) {
  extern __shared__ int shared[];
  const int buckets = num_experts + 1;
  int* next = shared + threadIdx.y * buckets;
  const int chunk = blockIdx.x * blockDim.y + threadIdx.y;
  if (chunk >= chunks) return;
  for (int b = threadIdx.x; b < buckets; b += kWarp) {
    next[b] = expert_offsets[b] + counts[static_cast<int64_t>(chunk) * buckets + b];
  }
  __syncwarp();
  const unsigned lanes_below = (1u << threadIdx.x) - 1;
  const int64_t first = static_cast<int64_t>(chunk) * chunk_rows;
  const int64_t last = min(first + chunk_rows, static_cast<int64_t>(rows));
  for (int64_t start = first; start < last; start += kWarp) {
    const int64_t n = start + threadIdx.x;
    const bool live = n < last;
    // Lanes past the end match one another only, under a bucket that nobody has.
    const int bucket = live ? bucket_of(ids[n], num_experts) : buckets;
    const unsigned peers = __match_any_sync(kFullWarp, bucket);
    const int rank = __popc(peers & lanes_below);
    int position = live ? next[bucket] : 0;
    __syncwarp();
    if (live && rank == 0) next[bucket] = position + __popc(peers);
    __syncwarp();
    if (live) {
      position += rank;
      row_order[position] = static_cast<int>(n);
      inverse_order[n] = position;
    }
  }
}

}  // namespace

gpu::Sorted gpu::expert_sort(Tensor ids, int64_t num_experts) {
  check_int32_vector(ids, "ids");
  const int64_t buckets = num_experts + 1;
  const int64_t largest = kSharedBytes / static_cast<int64_t>(sizeof(int)) - 1;
  UNIMOE_CHECK(num_experts >= 1 && num_experts <= largest, "num_experts (", num_experts,
               ") must be between 1 and ", largest);
  const int64_t rows = ids.size(0);
  UNIMOE_CHECK(rows <= std::numeric_limits<int32_t>::max(), "ids (", rows,
               " rows) must have fewer than 2^31");

  Tensor row_order = empty({rows}, ScalarType::Int, ids);
  Tensor inverse_order = empty({rows}, ScalarType::Int, ids);
  Tensor tokens_per_expert = empty({num_experts}, ScalarType::Int, ids);
  Tensor expert_offsets = empty({buckets}, ScalarType::Int, ids);

  const int64_t chunks = std::min<int64_t>(ceil_div<int64_t>(rows, kIdsPerChunk), kMaxChunks);
  const int64_t chunk_rows = chunks ? ceil_div(rows, chunks) : 0;
  Tensor counts = empty({chunks, buckets}, ScalarType::Int, ids);

  const int64_t bucket_bytes = buckets * static_cast<int64_t>(sizeof(int));
  const int64_t warps = std::min<int64_t>(kWarpsPerBlock, kSharedBytes / bucket_bytes);
  LaunchShape by_chunk;
  by_chunk.grid = dim3(static_cast<unsigned>(ceil_div(chunks, warps)));
  by_chunk.block = dim3(kWarp, static_cast<unsigned>(warps));
  by_chunk.shared_bytes = warps * bucket_bytes;

  launch(count_kernel, by_chunk, ids, const_data<int>(ids), mutable_data<int>(counts), rows,
         chunk_rows, chunks, num_experts);
  launch(scan_kernel, {dim3(1), dim3(kScanThreads)}, ids, mutable_data<int>(counts),
         mutable_data<int>(tokens_per_expert), mutable_data<int>(expert_offsets), chunks,
         num_experts);
  launch(scatter_kernel, by_chunk, ids, const_data<int>(ids), const_data<int>(counts),
         const_data<int>(expert_offsets), mutable_data<int>(row_order),
         mutable_data<int>(inverse_order), rows, chunk_rows, chunks, num_experts);
  return {row_order, inverse_order, tokens_per_expert, expert_offsets};
}

}  // namespace unimoe

STABLE_TORCH_LIBRARY_IMPL(unimoe, CUDA, m) {
  m.impl("expert_sort", TORCH_BOX(&unimoe::gpu::expert_sort));
}
