// dW[e] = grad[rows of e]' * x[rows of e], both read through maps that end where the rows do. A
// gather in the place of one of them took 1.4 to 1.7 times as long on an H100.
#pragma once

#include "matmul_rows.cuh"

namespace unimoe::sm90 {

struct WeightGradientArguments {
  const int* offsets;
  uint16_t* grad_weight;  // [experts, height, width]
  int experts;
  int height;
  int width;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    weight_gradient_kernel(const __grid_constant__ TensorMap grad_map,
                           const __grid_constant__ TensorMap x_map,
                           const WeightGradientArguments a) {
#if UNIMOE_SM90A
  extern __shared__ __align__(1024) char shared[];
  Ring ring(shared);
  if (threadIdx.x == 0) ring.init(kTmaProducers);
  __syncthreads();

  const int row_tiles = tiles_of(a.height, kTileRows);
  const int column_tiles = tiles_of(a.width, kTileColumns);
  const int tiles = a.experts * row_tiles * column_tiles;
  if (threadIdx.x < kWarpgroup) {
    give_registers<Registers<false>::kProducer>();
    if (threadIdx.x != 0) return;
    for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
      const WeightTile tile = weight_tile(t, row_tiles, column_tiles);
      const int begin = a.offsets[tile.expert], size = a.offsets[tile.expert + 1] - begin;
      for (int k = 0; k < size; k += kTileDepth) {
        const RaggedPlace place = ragged_place(k, begin, size);
        wait(ring.empty(), ring.parity ^ 1);
        arrive_and_expect(ring.full(), kStageBytes);
#pragma unroll
        for (int i = 0; i < kTileRows / kBlockColumns; ++i) {
          load_box(ring.left() + i * kBlockBytes, grad_map, ring.full(),
                   tile.row + i * kBlockColumns, place.row, place.end, place.origin);
        }
#pragma unroll
        for (int i = 0; i < kTileColumns / kBlockColumns; ++i) {
          load_box(ring.right() + i * kBlockBytes, x_map, ring.full(),
                   tile.column + i * kBlockColumns, place.row, place.end, place.origin);
        }
        ring.advance();
      }
    }
  } else {
    take_registers<Registers<false>::kConsumer>();
    const Consumer self(shared);
    float sums[kSums];
    for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
      const WeightTile tile = weight_tile(t, row_tiles, column_tiles);
      const int size = a.offsets[tile.expert + 1] - a.offsets[tile.expert];
      if (size == 0) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[i] = 0;
      }
      sum_products<T, false, 1, 1>(self, ring, tiles_of(size, kTileDepth), sums);
      uint16_t* grad_weight =
          a.grad_weight + static_cast<int64_t>(tile.expert) * a.height * a.width;
      store_sums<T>(self,
                    {grad_weight, a.width, tile.row + self.number * kConsumerRows, a.height,
                     tile.column, a.width},
                    sums);
    }
  }
#endif
}

}  // namespace unimoe::sm90
