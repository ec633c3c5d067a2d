// Schedule of the grouped matmul for few rows: work items, each a tile of rows of one expert by a
// tile of columns by a part of the sum, distributed over a number of blocks that the host chooses
// without reading the offsets.
//
// Items of an expert are consecutive, with row tiles varying fastest: blocks that run concurrently
// then share the weights of a column tile, which are read from memory once.
#pragma once

#include "launch.cuh"

namespace unimoe {

constexpr int kSumWarps = 4;       // of a block; each sums every fourth step
constexpr int kStepElements = 64;  // of a sum, which a warp reads at a time: 128 bytes per row
constexpr int kGroupRows = 16;     // rows of a weight in one matrix instruction
constexpr int kWeightRows = 32;    // rows of a weight in an item: two groups
constexpr int kPairRows = 16;      // rows of x in two matrix instructions
constexpr int kMostParts = 16;     // of a sum

// With `gated` an item has kGroupRows columns: their gate rows and their up rows.
struct FewRowsSchedule {
  int experts;
  int width;       // columns of the output
  int inner;       // elements of a sum
  int tile_rows;   // rows of x in an item
  int tile_width;  // columns of the output in an item
  int columns;     // column tiles
  int rounds;      // steps that each warp makes for an item
  int parts;       // of a sum

  __host__ __device__ int items_of_row_tile() const { return columns * parts; }
  __host__ __device__ int row_tiles(int rows) const { return ceil_div(rows, tile_rows); }
  // First element of a step of the sum; at or past `inner` there is nothing to add.
  __host__ __device__ int step_start(int part, int round, int warp) const {
    return ((part * rounds + round) * kSumWarps + warp) * kStepElements;
  }
};

struct Item {
  int row_tile;  // of its expert
  int column;    // first of its columns
  int part;
};

// The item number `item` of those of an expert with `row_tiles` row tiles.
__host__ __device__ inline Item item_of(const FewRowsSchedule& schedule, int item, int row_tiles) {
  const int rest = item / row_tiles;
  return {item % row_tiles, rest % schedule.columns * schedule.tile_width, rest / schedule.columns};
}

// No offsets give more row tiles than this: an expert with rows has at most one that is not full.
inline int64_t most_row_tiles(int64_t rows, int64_t experts, int64_t tile_rows) {
  return rows / tile_rows + std::min(rows, experts);
}

// About how many experts have rows where routing is uniform.
inline int64_t likely_experts(int64_t rows, int64_t experts) {
  return ceil_div(rows * experts, rows + experts);
}

// A sum is split if there are fewer items than multiprocessors; one block on each keeps enough
// bytes in flight. A part has at least two rounds.
inline FewRowsSchedule few_rows_schedule(int64_t rows, int64_t experts, int64_t width,
                                         int64_t inner, bool gated, int multiprocessors) {
  FewRowsSchedule schedule{};
  schedule.experts = static_cast<int>(experts);
  schedule.width = static_cast<int>(width);
  schedule.inner = static_cast<int>(inner);
  schedule.tile_rows = rows > 8 * experts ? 2 * kPairRows : kPairRows;
  schedule.tile_width = gated ? kGroupRows : kWeightRows;
  schedule.columns = ceil_div(schedule.width, schedule.tile_width);
  const int64_t items = likely_experts(rows, experts) * schedule.columns;
  const int rounds =
      std::max(1, static_cast<int>(ceil_div<int64_t>(inner, kStepElements * kSumWarps)));
  const int64_t wanted = std::max<int64_t>(1, multiprocessors / std::max<int64_t>(1, items));
  const int64_t parts = std::min<int64_t>({wanted, kMostParts, std::max(1, rounds / 2)});
  schedule.rounds = static_cast<int>(ceil_div<int64_t>(rounds, parts));
  schedule.parts = ceil_div(rounds, schedule.rounds);
  return schedule;
}

// The row tiles of all experts, counted by a warp: each lane has the next `span` experts.
struct RowTiles {
  int span;
  int before;  // row tiles of the experts of earlier lanes
  int total;
};

__device__ inline RowTiles count_row_tiles(const FewRowsSchedule& schedule, const int* offsets) {
  const int lane = threadIdx.x % kWarp;
  const int span = ceil_div(schedule.experts, kWarp);
  const int first = min(lane * span, schedule.experts);
  const int last = min(first + span, schedule.experts);
  int count = 0;
  for (int e = first; e < last; ++e) count += schedule.row_tiles(offsets[e + 1] - offsets[e]);
  int sum = count;
  for (int step = 1; step < kWarp; step *= 2) {
    const int below = __shfl_up_sync(kFullWarp, sum, step);
    if (lane >= step) sum += below;
  }
  return {span, sum - count, __shfl_sync(kFullWarp, sum, kWarp - 1)};
}

// An item with the rows of its expert. The same in all lanes, which search together.
struct Work {
  int expert;
  int first_row;  // in expert order
  int rows;       // at most tile_rows
  int column;
  int part;
};

__device__ inline Work find_work(const FewRowsSchedule& schedule, const RowTiles& tiles,
                                 const int* offsets, int item) {
  const int per_tile = schedule.items_of_row_tile();
  const int tile = item / per_tile;
  // Lanes without row tiles start where the next one does: the last of them owns the tile.
  const int lane = __popc(__ballot_sync(kFullWarp, tiles.before <= tile)) - 1;
  int before = __shfl_sync(kFullWarp, tiles.before, lane);
  int expert = lane * tiles.span;
  int begin = offsets[expert];
  int end = offsets[expert + 1];
  while (tile >= before + schedule.row_tiles(end - begin)) {
    before += schedule.row_tiles(end - begin);
    ++expert;
    begin = end;
    end = offsets[expert + 1];
  }
  const Item at = item_of(schedule, item - before * per_tile, schedule.row_tiles(end - begin));
  const int first_row = begin + at.row_tile * schedule.tile_rows;
  return {expert, first_row, min(end - first_row, schedule.tile_rows), at.column, at.part};
}

}  // namespace unimoe
