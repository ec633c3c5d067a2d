// The kernel of the grouped matmul for few rows. Reading weights is its bottleneck, so each warp
// streams its own steps of a sum through shared memory, with kStages - 1 of them always in flight,
// across items. Warps of a block synchronise once per item, to add up their sums.
//
// Weights are the left operand: a matrix instruction multiplies 16 of their rows by 8 rows of x.
#pragma once

#include "few_rows_schedule.cuh"
#include "tensor_core.cuh"

namespace unimoe {

constexpr int kFewRowsThreads = kSumWarps * kWarp;
constexpr int kChunkBytes = 16;
constexpr int kChunkElements = 8;
constexpr int kStepBytes = kStepElements * 2;
constexpr int kStepChunks = kStepBytes / kChunkBytes;
constexpr int kCopyRows = kWarp / kStepChunks;  // rows that a warp copies with one instruction
constexpr int kWeightBytes = kWeightRows * kStepBytes;
// Of a warp. Three let three blocks of 72 KiB share a multiprocessor of 227 KiB, with 96 KiB of
// weights on the way; four would be two blocks with as much on the way and fewer warps.
constexpr int kStages = 3;
// Of a row of sums in shared memory: no two lanes of a fragment write to the same bank.
constexpr int kSumStride = kWeightRows + 4;

template <int kPairs>
constexpr int kStageBytes = kWeightBytes + kPairs * kPairRows * kStepBytes;
template <int kPairs>
constexpr int kFewRowsSharedBytes = kSumWarps * kStages * kStageBytes<kPairs>;

template <typename T>
struct FewRows {
  FewRowsSchedule schedule;
  const T* x;
  const T* weight;
  int64_t weight_stride_e;
  int64_t weight_stride_n;
  const int* offsets;
  const int* order;  // null where x is in expert order
  int top_k;
  int rows;
  T* y;
  float* partial;  // [parts, rows, weight rows of an expert], or null where sums are not split
};

// Rows of kStepBytes with their chunks permuted: the eight chunks of a column lie in all banks.
__device__ inline int chunk_offset(int row, int chunk) {
  return row * kStepBytes + (chunk ^ (row % kStepChunks)) * kChunkBytes;
}

__device__ inline float gated_silu(float gate, float up) { return gate / (1 + exp(-gate)) * up; }

// Copies the steps of a warp, item after item: lane l chunk l % 8 of every fourth row, from row
// l / 8 on. What does not change within an item is worked out once for it. Addresses of copies of
// 0 bytes may lie outside of the tensor.
template <typename T, int kPairs, bool kGated>
struct StepLoader {
  static constexpr int kTokens = kPairs * kPairRows / kCopyRows;
  static constexpr int kCopiesPerGroup = kGroupRows / kCopyRows;
  static_assert(kCopyRows == 4 && kStepChunks == 8);

  const FewRows<T>& problem;
  const RowTiles& tiles;
  int item;
  int items;
  int round = 0;
  int first_row = 0;
  int rows = 0;
  int columns_left = 0;       // from the lane's first column on
  int k = 0;                  // of the lane's chunk
  const T* weight = nullptr;  // the lane's first row
  int tokens[kTokens] = {};   // rows of x, or -1

  __device__ StepLoader(const FewRows<T>& problem, const RowTiles& tiles, int items)
      : problem(problem), tiles(tiles), item(blockIdx.x), items(items) {
    find();
  }

  __device__ void find() {
    if (item >= items) return;
    const FewRowsSchedule& schedule = problem.schedule;
    const Work work = find_work(schedule, tiles, problem.offsets, item);
    const int lane = threadIdx.x % kWarp;
    const int row = lane / kStepChunks;
    first_row = work.first_row;
    rows = work.rows;
    columns_left = schedule.width - work.column - row;
    k = schedule.step_start(work.part, 0, threadIdx.x / kWarp) +
        lane % kStepChunks * kChunkElements;
    weight = problem.weight + work.expert * problem.weight_stride_e +
             (work.column + row) * problem.weight_stride_n;
  }

  __device__ void find_tokens() {
    const int row = threadIdx.x % kWarp / kStepChunks;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int at = row + i * kCopyRows;
      const int position = first_row + at;
      tokens[i] = -1;
      if (at >= rows) continue;
      tokens[i] = problem.order ? problem.order[position] / problem.top_k : position;
    }
  }

  // Starts the copies of the next step, of which there are none after the last item.
  __device__ void load(unsigned char* stage) {
    if (item < items) {
      copy_step(stage);
      k += kSumWarps * kStepElements;
      if (++round == problem.schedule.rounds) {
        round = 0;
        item += gridDim.x;
        find();
      }
    }
    commit_copies();
  }

  __device__ void copy_step(unsigned char* stage) {
    const int lane = threadIdx.x % kWarp;
    const int row = lane / kStepChunks, chunk = lane % kStepChunks;
    const FewRowsSchedule& schedule = problem.schedule;
    const bool inside = k < schedule.inner;
    // Every other row of the lane is one whose chunks are permuted by four more.
    unsigned char* const to[2] = {
        stage + chunk_offset(row, chunk),
        stage + chunk_offset(row + kCopyRows, chunk) - kCopyRows * kStepBytes};
    const T* const weight_chunk = weight + k;
    const int64_t stride = problem.weight_stride_n;
#pragma unroll
    for (int i = 0; i < kWeightRows / kCopyRows; ++i) {
      const int column = (kGated ? i % kCopiesPerGroup : i) * kCopyRows;
      const int n = column + (kGated ? i / kCopiesPerGroup * schedule.width : 0);
      const bool live = inside && column < columns_left;
      copy_async_16(to[i % 2] + i * kCopyRows * kStepBytes, weight_chunk + n * stride,
                    live ? kChunkBytes : 0);
    }
    // Weights are in flight while the order is read.
    if (round == 0) find_tokens();
    const T* const x_chunk = problem.x + k;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (i * kCopyRows / kPairRows * kPairRows >= rows) break;
      const bool live = inside && tokens[i] >= 0;
      const int64_t from = static_cast<int64_t>(tokens[i]) * schedule.inner;
      copy_async_16(to[i % 2] + kWeightBytes + i * kCopyRows * kStepBytes, x_chunk + from,
                    live ? kChunkBytes : 0);
    }
  }
};

// Adds the products of a step to the sums [group of weight rows, 8 rows of x, fragment].
template <typename T, int kPairs>
__device__ void multiply_step(const unsigned char* stage, int rows,
                              float (&sums)[2][2 * kPairs][4]) {
  const int lane = threadIdx.x % kWarp;
  // The lane addresses row `row` of matrix 2 * high + low of four.
  const int row = lane % 8, low = lane / 8 % 2, high = lane / 16;
#pragma unroll
  for (int chunk = 0; chunk < kStepChunks; chunk += 2) {
    uint32_t weights[2][4];
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      const int weight_row = group * kGroupRows + low * 8 + row;
      load_matrices(weights[group], stage + chunk_offset(weight_row, chunk + high));
    }
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      if (pair * kPairRows >= rows) break;
      uint32_t x[4];
      const int x_row = pair * kPairRows + high * 8 + row;
      load_matrices(x, stage + kWeightBytes + chunk_offset(x_row, chunk + low));
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        multiply_add<T>(sums[group][2 * pair], weights[group], x[0], x[1]);
        multiply_add<T>(sums[group][2 * pair + 1], weights[group], x[2], x[3]);
      }
    }
  }
}

// Writes a warp's sums as [row of x, row of the weight].
template <int kPairs>
__device__ void stage_sums(const float (&sums)[2][2 * kPairs][4], float* to) {
  const int lane = threadIdx.x % kWarp;
  const int weight_row = lane / 4, x_row = lane % 4 * 2;
#pragma unroll
  for (int group = 0; group < 2; ++group) {
#pragma unroll
    for (int eight = 0; eight < 2 * kPairs; ++eight) {
      float* at = to + (eight * 8 + x_row) * kSumStride + group * kGroupRows + weight_row;
      at[0] = sums[group][eight][0];
      at[kSumStride] = sums[group][eight][1];
      at[8] = sums[group][eight][2];
      at[kSumStride + 8] = sums[group][eight][3];
    }
  }
}

// Adds the sums of the block's warps in their order, and writes the results of an item.
// `staged` is where warp 0 has its sums.
template <typename T, int kPairs, bool kGated>
__device__ void write_item(const FewRows<T>& problem, const Work& work,
                           const unsigned char* staged) {
  constexpr int kTileWidth = kGated ? kGroupRows : kWeightRows;
  constexpr int kWarpBytes = kStages * kStageBytes<kPairs>;
  const int width = problem.schedule.width;
  const auto total = [&](int at) {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kSumWarps; ++warp) {
      sum += reinterpret_cast<const float*>(staged + warp * kWarpBytes)[at];
    }
    return sum;
  };
  for (int i = threadIdx.x; i < work.rows * kTileWidth; i += kFewRowsThreads) {
    const int in_tile = i % kTileWidth, column = work.column + in_tile;
    if (column >= width) continue;
    const int at = i / kTileWidth * kSumStride + in_tile;
    const int64_t row = work.first_row + i / kTileWidth;
    const float sum = total(at);
    const float up = kGated ? total(at + kGroupRows) : 0;
    if (problem.partial) {
      const int64_t line = static_cast<int64_t>(work.part) * problem.rows + row;
      float* to = problem.partial + line * (kGated ? 2 : 1) * width + column;
      to[0] = sum;
      if (kGated) to[width] = up;
    } else {
      problem.y[row * width + column] = static_cast<T>(kGated ? gated_silu(sum, up) : sum);
    }
  }
}

template <typename T, int kPairs, bool kGated>
__global__ void __launch_bounds__(kFewRowsThreads, 3) few_rows_kernel(const FewRows<T> problem) {
  extern __shared__ __align__(128) unsigned char shared[];
  static_assert(kPairs * kPairRows * kSumStride * 4 <= kStageBytes<kPairs>);
  unsigned char* stages = shared + threadIdx.x / kWarp * kStages * kStageBytes<kPairs>;
  const FewRowsSchedule& schedule = problem.schedule;
  const RowTiles tiles = count_row_tiles(schedule, problem.offsets);
  const int items = tiles.total * schedule.items_of_row_tile();
  StepLoader<T, kPairs, kGated> loader(problem, tiles, items);
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) loader.load(stages + i * kStageBytes<kPairs>);
  int stage = 0;
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const Work work = find_work(schedule, tiles, problem.offsets, item);
    float sums[2][2 * kPairs][4] = {};
    int current = 0;
    for (int round = 0; round < schedule.rounds; ++round) {
      wait_for_copies<kStages - 2>();
      // Every lane has waited for its part of this stage, and has read the one before.
      __syncwarp();
      current = stage;
      const int before = stage == 0 ? kStages - 1 : stage - 1;
      loader.load(stages + before * kStageBytes<kPairs>);
      multiply_step<T, kPairs>(stages + current * kStageBytes<kPairs>, work.rows, sums);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    // The stage that has been read is not loaded again before the next round.
    __syncwarp();
    stage_sums<kPairs>(sums, reinterpret_cast<float*>(stages + current * kStageBytes<kPairs>));
    __syncthreads();
    write_item<T, kPairs, kGated>(problem, work, shared + current * kStageBytes<kPairs>);
    __syncthreads();
  }
  wait_for_copies<0>();
}

// Adds the parts of every sum in their order.
template <typename T, bool kGated>
__global__ void add_parts_kernel(const float* partial, const int* routed_rows, T* y, int rows,
                                 int width, int parts) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t row = i / width, column = i % width;
  if (row >= min(*routed_rows, rows)) return;
  const int64_t line = (kGated ? 2 : 1) * static_cast<int64_t>(width);
  float sum = 0, up = 0;
  for (int part = 0; part < parts; ++part) {
    const float* from = partial + (static_cast<int64_t>(part) * rows + row) * line + column;
    sum += from[0];
    if (kGated) up += from[width];
  }
  y[i] = static_cast<T>(kGated ? gated_silu(sum, up) : sum);
}

// Sets rows of no expert to zero.
template <typename T>
__global__ void clear_tail_kernel(const int* routed_rows, T* y, int64_t elements, int width) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < elements && i >= static_cast<int64_t>(*routed_rows) * width) y[i] = static_cast<T>(0.f);
}

}  // namespace unimoe
