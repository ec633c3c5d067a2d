// The functions of layout.h and tile_schedule.h for ctypes.
#include "cuda/sm90/layout.h"
#include "cuda/sm90/tile_schedule.h"

using namespace unimoe::sm90;

extern "C" {

int swizzled_byte(int row, int vector, int row_bytes) { return swizzled(row, vector, row_bytes); }
uint64_t along(uint32_t address, int step) { return along_depth(address, step); }
uint64_t across(uint32_t address, int step) { return across_depth(address, step); }
int row_of_sum(int warp, int lane, int half) { return sum_row(warp, lane, half); }
int column_of_sum(int j, int lane, int i) { return sum_column(j, lane, i); }
int row_stored(int warp, int lane) { return stored_row(warp, lane); }
int vector_stored(int j, int lane) { return stored_vector(j, lane); }

int count_tiles(int size, int tile) { return tiles_of(size, tile); }

// Writes expert, first row, end and column of each tile; returns how many there are.
int rows_tiles(const int* offsets, const int* tiles_before, int experts, int column_tiles,
               int columns, int* out) {
  const int tiles = tiles_before[experts] * column_tiles;
  for (int t = 0; t < tiles; ++t) {
    const RowsTile tile = rows_tile(t, tiles_before, offsets, experts, column_tiles, columns);
    out[4 * t] = tile.expert;
    out[4 * t + 1] = tile.first;
    out[4 * t + 2] = tile.end;
    out[4 * t + 3] = tile.column;
  }
  return tiles;
}

// Writes expert, row and column of each tile.
void weight_tiles(int experts, int row_tiles, int column_tiles, int* out) {
  for (int t = 0; t < experts * row_tiles * column_tiles; ++t) {
    const WeightTile tile = weight_tile(t, row_tiles, column_tiles);
    out[3 * t] = tile.expert;
    out[3 * t + 1] = tile.row;
    out[3 * t + 2] = tile.column;
  }
}

// Writes the coordinates of row k of an expert; returns the byte at which they read.
uint64_t ragged(int k, int begin, int size, uint64_t row_bytes, int* out) {
  const RaggedPlace place = ragged_place(k, begin, size);
  out[0] = place.row;
  out[1] = place.end;
  out[2] = place.origin;
  return ragged_byte(place, row_bytes);
}

void constants(int* out) {
  out[0] = kUsedSharedBytes;
  out[1] = kLargestSharedBytes;
  out[2] = kStages * kStageBytes;
  out[3] = kStagingAt;
  out[4] = kBarriersAt;
  out[5] = kTableAt;
}

}  // extern "C"
