// The backward of the second matmul and of the gate in one kernel. From dA' = dO[token] W2[e] and
// the pre-activations it writes, for each row, the gradient of the pre-activations, the activations
// times the row's score, and the sum of dA' * A per column tile, from which the gradient of the
// score is computed.
#pragma once

#include "matmul_rows.cuh"

namespace unimoe::sm90 {

struct GatedBackwardArguments {
  const void* grad;  // [tokens, inner]
  const int* order;
  const int* offsets;
  const float* scores;
  const uint16_t* hidden;  // [rows, 2 * width]
  uint16_t* grad_hidden;   // [rows, 2 * width], or null
  uint16_t* weighted;      // [rows, width], or null
  float* score_sums;       // [column tiles, rows]
  int rows;
  int experts;
  int inner;
  int width;
  int top_k;
};

#if UNIMOE_SM90A

// Transfers 64 columns of a consumer's rows from or to global memory.
struct Panel {
  static constexpr int kVectors = kBlockColumns / kVectorElements;
  static constexpr int kTurns = kConsumerRows * kVectors / kWarpgroup;
  char* data;

  // Calls `body(vector in shared memory, row, vector)` for the vectors of this thread.
  template <typename Body>
  __device__ void each_vector(int thread, Body&& body) const {
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int n = i * kWarpgroup + thread, row = n / kVectors, vector = n % kVectors;
      body(*reinterpret_cast<uint4*>(data + swizzled(row, vector, kBlockRowBytes)), row, vector);
    }
  }

  // The pair of columns 8 * j + 2 * (lane % 4) of the upper or lower one of a thread's rows.
  __device__ uint32_t& pair(const Consumer& self, int j, int half) const {
    const int at = swizzled(sum_row(self.warp, self.lane, half), j, kBlockRowBytes);
    return *reinterpret_cast<uint32_t*>(data + at + self.lane % 4 * 4);
  }
};

__device__ __forceinline__ void load_panel(const Consumer& self, const Panel& panel,
                                           const uint16_t* from, int64_t stride,
                                           const Target& place) {
  panel.each_vector(self.thread, [&](uint4& value, int row, int vector) {
    const uint16_t* at =
        from + (place.row + row) * stride + place.column + vector * kVectorElements;
    value = place.holds(row, vector) ? __ldg(reinterpret_cast<const uint4*>(at))
                                     : make_uint4(0, 0, 0, 0);
  });
}

__device__ __forceinline__ void store_panel(const Consumer& self, const Panel& panel,
                                            const Target& to) {
  panel.each_vector(self.thread, [&](const uint4& value, int row, int vector) {
    if (to.holds(row, vector)) *to.at(row, vector) = value;
  });
}

template <typename T>
__device__ __forceinline__ void store_gradients(const Consumer& self,
                                                const GatedBackwardArguments& a,
                                                const RowsTile& tile, const float (&sums)[kSums]) {
  const int first = tile.first + self.number * kConsumerRows;
  int rows[2];
  float score[2], score_sum[2] = {0, 0};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    rows[half] = first + sum_row(self.warp, self.lane, half);
    score[half] = rows[half] < tile.end ? a.scores[a.order[rows[half]]] : 0.f;
  }
  const Panel gates{self.staging}, ups{self.staging + kStagingBytes / 2};
  const int64_t width = a.width;
#pragma unroll
  for (int part = 0; part < kTileColumns / kBlockColumns; ++part) {
    const int column = tile.column + part * kBlockColumns;
    const Target place{a.grad_hidden, 2 * width, first, tile.end, column, a.width};
    load_panel(self, gates, a.hidden, 2 * width, place);
    load_panel(self, ups, a.hidden + width, 2 * width, place);
    self.sync();
    uint32_t weighted[16];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t &gate_pair = gates.pair(self, j, half), &up_pair = ups.pair(self, j, half);
        const float2 gate = widen_pair<T>(gate_pair), up = widen_pair<T>(up_pair);
        const int i = (part * 8 + j) * 4 + 2 * half;
        const float s0 = sigmoid(gate.x), s1 = sigmoid(gate.y);
        const float open0 = gate.x * s0, open1 = gate.y * s1;
        const float act0 = open0 * up.x, act1 = open1 * up.y;
        score_sum[half] += sums[i] * act0 + sums[i + 1] * act1;
        weighted[j * 2 + half] = round_pair<T>(score[half] * act0, score[half] * act1);
        const float d0 = score[half] * sums[i], d1 = score[half] * sums[i + 1];
        gate_pair =
            round_pair<T>(d0 * up.x * (s0 + open0 * (1 - s0)), d1 * up.y * (s1 + open1 * (1 - s1)));
        up_pair = round_pair<T>(d0 * open0, d1 * open1);
      }
    }
    self.sync();
    if (a.grad_hidden != nullptr) {
      store_panel(self, gates, place);
      Target up_place = place;
      up_place.data += width;
      store_panel(self, ups, up_place);
    }
    self.sync();
    if (a.weighted != nullptr) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          gates.pair(self, j, half) = weighted[j * 2 + half];
        }
      }
      self.sync();
      store_panel(self, gates, {a.weighted, width, first, tile.end, column, a.width});
      self.sync();
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // The four lanes that share a row.
    score_sum[half] += __shfl_xor_sync(~0u, score_sum[half], 1);
    score_sum[half] += __shfl_xor_sync(~0u, score_sum[half], 2);
    if (self.lane % 4 == 0 && rows[half] < tile.end) {
      const int64_t column_tile = tile.column / kTileColumns;
      a.score_sums[column_tile * a.rows + rows[half]] = score_sum[half];
    }
  }
}

#endif

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    gated_backward_kernel(const __grid_constant__ TensorMap down_map,
                          const GatedBackwardArguments a) {
#if UNIMOE_SM90A
  extern __shared__ __align__(1024) char shared[];
  int* tiles_before = reinterpret_cast<int*>(shared + kTableAt);
  Ring ring(shared);
  if (threadIdx.x == 0) ring.init(kGatherProducers);
  if (threadIdx.x < 32) count_row_tiles(a.offsets, a.experts, tiles_before);
  __syncthreads();

  const int column_tiles = tiles_of(a.width, kTileColumns);
  const int tiles = tiles_before[a.experts] * column_tiles;
  const int steps = tiles_of(a.inner, kTileDepth);
  const auto tile_of = [&](int t) {
    return rows_tile(t, tiles_before, a.offsets, a.experts, column_tiles, kTileColumns);
  };
  if (threadIdx.x < kWarpgroup) {
    give_registers<Registers<true>::kProducer>();
    for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
      const RowsTile tile = tile_of(t);
      const GatheredRows rows(a.grad, a.order, tile.first, a.rows, a.top_k, a.inner);
      for (int k = 0; k < steps; ++k) {
        wait(ring.empty(), ring.parity ^ 1);
        if (threadIdx.x == 0) {
          arrive_and_expect(ring.full(), kRightBytes);
          load_weight<Weight::kAcrossDepth>(ring, down_map, tile.expert, k * kTileDepth,
                                            tile.column, 0);
        }
        rows.copy(ring.left(), ring.full(), k * kTileDepth);
        ring.advance();
      }
    }
  } else {
    take_registers<Registers<true>::kConsumer>();
    const Consumer self(shared);
    float sums[kSums];
    for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
      const RowsTile tile = tile_of(t);
      sum_products<T, true, 0, 1>(self, ring, steps, sums);
      store_gradients<T>(self, a, tile, sums);
    }
  }
#endif
}

}  // namespace unimoe::sm90
