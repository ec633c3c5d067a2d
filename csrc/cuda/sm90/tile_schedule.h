// In which order the blocks of a persistent grid visit the tiles of ragged matmuls. Plain functions
// of integers, the same on the host and on the device.
#pragma once

#include "layout.h"

namespace unimoe::sm90 {

// Row tiles that go through all columns together: their rows and the weights stay in the L2 cache.
constexpr int kGroup = 8;

struct TilePlace {
  int row;     // a row tile
  int column;  // a column tile
};

// Tile `t` of a grid of `row_tiles` by `column_tiles`: rows first within a group, then columns.
UNIMOE_HOST_DEVICE constexpr TilePlace place_of(int t, int row_tiles, int column_tiles) {
  const int in_group = kGroup * column_tiles;
  const int top = t / in_group * kGroup;
  const int height = row_tiles - top < kGroup ? row_tiles - top : kGroup;
  return {top + t % in_group % height, t % in_group / height};
}

UNIMOE_HOST_DEVICE constexpr int tiles_of(int size, int tile) { return (size + tile - 1) / tile; }

// Rows of one expert, from `first` on, that end before `end`; columns from `column` on.
struct RowsTile {
  int expert;
  int first;
  int end;
  int column;
};

// The expert that owns a row tile. `tiles_before[e]` counts the row tiles of experts below e; an
// expert without rows owns none.
UNIMOE_HOST_DEVICE constexpr int owner_of(const int* tiles_before, int experts, int row_tile) {
  int low = 0, high = experts - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (tiles_before[middle + 1] > row_tile) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Tile `t` of a matmul over all rows; `columns` is the width of a tile.
UNIMOE_HOST_DEVICE constexpr RowsTile rows_tile(int t, const int* tiles_before, const int* offsets,
                                                int experts, int column_tiles, int columns) {
  const TilePlace place = place_of(t, tiles_before[experts], column_tiles);
  const int expert = owner_of(tiles_before, experts, place.row);
  return {expert, offsets[expert] + (place.row - tiles_before[expert]) * kTileRows,
          offsets[expert + 1], place.column * columns};
}

// A tile of the weight gradient of one expert.
struct WeightTile {
  int expert;
  int row;
  int column;
};

UNIMOE_HOST_DEVICE constexpr WeightTile weight_tile(int t, int row_tiles, int column_tiles) {
  const int tiles = row_tiles * column_tiles;
  const TilePlace place = place_of(t % tiles, row_tiles, column_tiles);
  return {t / tiles, place.row * kTileRows, place.column * kTileColumns};
}

// Rows of an expert through a map of four dimensions whose third and fourth move its end: the rows
// are the last before coordinate 2^30 of the second, past which TMA gives zeros. The product of the
// fourth's coordinate and stride is 2^64 less what the second has too much.
constexpr int kRaggedEnd = 1 << 30;
constexpr uint64_t kRaggedSpan = uint64_t{1} << 34;

struct RaggedPlace {
  int row;     // coordinate of the second dimension
  int end;     // of the third
  int origin;  // of the fourth
};

// Row `k` of the `size` rows from `begin` on.
UNIMOE_HOST_DEVICE constexpr RaggedPlace ragged_place(int k, int begin, int size) {
  return {kRaggedEnd - size + k, begin + size, kRaggedEnd};
}

// Byte from the tensor's beginning at which TMA reads such a place, with rows of `row_bytes`.
UNIMOE_HOST_DEVICE constexpr uint64_t ragged_byte(RaggedPlace place, uint64_t row_bytes) {
  return place.row * row_bytes + place.end * row_bytes +
         static_cast<uint64_t>(place.origin) * (kRaggedSpan - row_bytes);
}

}  // namespace unimoe::sm90
