// Multiplies rows in expert order by the weights of their experts, in a persistent grid whose tiles
// are computed from the offsets on the device.
#pragma once

#include <algorithm>

#include "../launch.cuh"
#include "../resident.cuh"
#include "products.cuh"

namespace unimoe::sm90 {

enum class Epilogue {
  kPlain,      // y = sums
  kGated,      // y = silu(gate) * up
  kGatedKept,  // and the pre-activations
};

struct RowsArguments {
  const void* x;     // of gathered rows: a row for each token
  const int* order;  // of gathered rows: the routed row at each place
  const int* offsets;
  uint16_t* y;
  uint16_t* hidden;  // pre-activations [rows, 2 * width]
  int rows;
  int experts;
  int inner;
  int width;  // of y
  int top_k;
  bool zero_tail;  // whether rows that no expert owns become zero
};

#if UNIMOE_SM90A

__device__ __forceinline__ void zero_rows(const RowsArguments& a) {
  const int64_t vectors = a.width / kVectorElements;
  const int64_t first = a.offsets[a.experts] * vectors, last = a.rows * vectors;
  const int64_t apart = static_cast<int64_t>(gridDim.x) * kConsumers * kWarpgroup;
  const int own = threadIdx.x - kWarpgroup;
  for (int64_t i = first + static_cast<int64_t>(blockIdx.x) * kConsumers * kWarpgroup + own;
       i < last; i += apart) {
    reinterpret_cast<uint4*>(a.y)[i] = make_uint4(0, 0, 0, 0);
  }
}

template <typename T, Epilogue kEpilogue>
__device__ __forceinline__ void store_tile(const Consumer& self, const RowsArguments& a,
                                           const RowsTile& tile, const float (&sums)[kSums]) {
  Target y{a.y, a.width, tile.first + self.number * kConsumerRows, tile.end, tile.column, a.width};
  if constexpr (kEpilogue == Epilogue::kPlain) {
    store_sums<T>(self, y, sums);
  } else {
    // The first 128 columns of the sums are gates, the others are up.
    if constexpr (kEpilogue == Epilogue::kGatedKept) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        Target hidden = y;
        hidden.data = a.hidden + part * static_cast<int64_t>(a.width);
        hidden.stride = 2 * static_cast<int64_t>(a.width);
        store_columns(self, hidden, [&](int j, int half) {
          const int i = (part * 16 + j) * 4 + 2 * half;
          return round_pair<T>(sums[i], sums[i + 1]);
        });
      }
    }
    store_columns(self, y, [&](int j, int half) {
      const int i = j * 4 + 2 * half;
      return round_pair<T>(silu(sums[i]) * sums[kSums / 2 + i],
                           silu(sums[i + 1]) * sums[kSums / 2 + i + 1]);
    });
  }
}

#endif

template <typename T, bool kGathers, Weight kWeight, Epilogue kEpilogue>
__global__ void __launch_bounds__(kThreads, 1)
    matmul_rows_kernel(const __grid_constant__ TensorMap rows_map,
                       const __grid_constant__ TensorMap weight_map, const RowsArguments a) {
#if UNIMOE_SM90A
  extern __shared__ __align__(1024) char shared[];
  int* tiles_before = reinterpret_cast<int*>(shared + kTableAt);
  Ring ring(shared);
  if (threadIdx.x == 0) ring.init(kGathers ? kGatherProducers : kTmaProducers);
  if (threadIdx.x < 32) count_row_tiles(a.offsets, a.experts, tiles_before);
  __syncthreads();

  // A gated tile has half its columns of each half of the weight.
  constexpr int kColumns = kEpilogue == Epilogue::kPlain ? kTileColumns : kTileColumns / 2;
  const int column_tiles = tiles_of(a.width, kColumns);
  const int tiles = tiles_before[a.experts] * column_tiles;
  const int steps = tiles_of(a.inner, kTileDepth);
  const auto tile_of = [&](int t) {
    return rows_tile(t, tiles_before, a.offsets, a.experts, column_tiles, kColumns);
  };
  if (threadIdx.x < kWarpgroup) {
    give_registers<Registers<kGathers>::kProducer>();
    if (!kGathers && threadIdx.x != 0) return;
    for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
      const RowsTile tile = tile_of(t);
      const int second = tile.column + (kEpilogue == Epilogue::kPlain ? kTileColumns / 2 : a.width);
      const auto load = [&](int k, auto&& load_left) {
        wait(ring.empty(), ring.parity ^ 1);
        if (threadIdx.x == 0) {
          arrive_and_expect(ring.full(), kGathers ? kRightBytes : kStageBytes);
          load_weight<kWeight>(ring, weight_map, tile.expert, k, tile.column, second);
        }
        load_left(k);
        ring.advance();
      };
      if constexpr (kGathers) {
        const GatheredRows rows(a.x, a.order, tile.first, a.rows, a.top_k, a.inner);
        for (int k = 0; k < steps; ++k) {
          load(k * kTileDepth, [&](int from) { rows.copy(ring.left(), ring.full(), from); });
        }
      } else {
        for (int k = 0; k < steps; ++k) {
          load(k * kTileDepth,
               [&](int from) { load_box(ring.left(), rows_map, ring.full(), from, tile.first); });
        }
      }
    }
  } else {
    take_registers<Registers<kGathers>::kConsumer>();
    const Consumer self(shared);
    float sums[kSums];
    for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
      const RowsTile tile = tile_of(t);
      sum_products<T, kGathers, 0, kWeight == Weight::kAcrossDepth>(self, ring, steps, sums);
      store_tile<T, kEpilogue>(self, a, tile, sums);
    }
    if (a.zero_tail) zero_rows(a);
  }
#endif
}

// The blocks of a persistent grid: as many as fit on the device, and none without a tile.
inline LaunchShape persistent_shape(int64_t most_tiles, const Tensor& on) {
  UNIMOE_CHECK(most_tiles < (int64_t{1} << 31), "there must be fewer than 2^31 tiles, not ",
               most_tiles);
  LaunchShape shape;
  shape.grid =
      dim3(static_cast<unsigned>(std::min<int64_t>(most_tiles, count_multiprocessors(on))));
  shape.block = dim3(kThreads);
  shape.shared_bytes = kUsedSharedBytes;
  return shape;
}

// Each expert may begin a tile that it does not fill.
inline int64_t most_row_tiles(int64_t rows, int64_t experts) {
  return rows / kTileRows + std::min(rows, experts);
}

}  // namespace unimoe::sm90
