// The forward of the router with a token in the registers of a warp. Values are compared as
// integers in their order, of which a warp finds the largest in one instruction.
#pragma once

#include "router_lanes.cuh"
#include "router_parts.cuh"

namespace unimoe {

// What is below the order of every value.
constexpr int kNoOrder = std::numeric_limits<int>::lowest();

inline bool fits_lanes(const RouterCall& routing) {
  return routing.experts <= kMostLaneExperts &&
         (routing.num_groups == routing.top_groups || routing.num_groups <= kWarp);
}

// The best candidate of all lanes; ties go to the lower id.
struct LaneBest {
  int order;
  unsigned id;

  // Of the experts from `first` to `last` - 1, without `taken`.
  template <int N>
  __device__ LaneBest(const int (&orders)[N], int first, int last, unsigned taken) {
    int own = kNoOrder, at = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int e = LaneToken<N>::expert(i);
      const bool candidate = e >= first && e < last && static_cast<unsigned>(e) != taken;
      if (candidate && orders[i] > own) own = orders[i], at = e;
    }
    find(own, at);
  }

  template <int N>
  explicit __device__ LaneBest(const int (&orders)[N]) {
    int own = kNoOrder, at = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (orders[i] > own) own = orders[i], at = LaneToken<N>::expert(i);
    }
    find(own, at);
  }

 private:
  __device__ void find(int own, int at) {
    order = __reduce_max_sync(kFullWarp, own);
    id = __reduce_min_sync(kFullWarp, own == order ? static_cast<unsigned>(at) : ~0u);
  }
};

// Gives the experts outside of a token's groups the order of -infinity. Lane g ranks group g.
template <int N>
__device__ void close_groups(const RouterCall& routing, bool biased, int (&orders)[N]) {
  const int size = routing.experts / routing.num_groups;
  // DeepSeek-V2 ranks groups by their best expert; V3, which has the bias, by the best two.
  const bool two = biased && size > 1;
  int rank = kNoOrder;
  for (int g = 0; g < routing.num_groups; ++g) {
    const int first = g * size, last = first + size;
    const LaneBest best(orders, first, last, ~0u);
    float value = Order<float>::value_of(best.order);
    if (two) value += Order<float>::value_of(LaneBest(orders, first, last, best.id).order);
    if (static_cast<int>(threadIdx.x) == g) rank = Order<float>::of(value);
  }
  unsigned used = 0;
  for (int n = 0; n < routing.top_groups; ++n) {
    const int top = __reduce_max_sync(kFullWarp, rank);
    const int g = __ffs(__ballot_sync(kFullWarp, rank == top)) - 1;
    used |= 1u << g;
    if (static_cast<int>(threadIdx.x) == g) rank = kNoOrder;
  }
  const int closed = Order<float>::of(-std::numeric_limits<float>::infinity());
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int e = LaneToken<N>::expert(i);
    if (e < routing.experts && !(used >> (e / size) & 1)) orders[i] = closed;
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kMaxWarps* kWarp, kMinBlocks<N>)
    route_lanes_kernel(const T* __restrict__ logits, const float* __restrict__ bias,
                       const bool* __restrict__ mask, float* __restrict__ scores,
                       int* __restrict__ ids, Parts<float> parts, int64_t tokens,
                       RouterCall routing, float scale) {
  extern __shared__ int block_counts[];
  __shared__ float totals[kMaxWarps][kWarp * N];
  const int experts = routing.experts, top_k = routing.top_k, warps = blockDim.y;
  const bool sigmoid_mode = is_sigmoid(routing.mode);
  int* block_chosen = block_counts;
  int* block_counted = block_chosen + experts;
  int* chosen = block_counted + experts + threadIdx.y * top_k;
  for (int i = threadIdx.y * kWarp + threadIdx.x; i < 2 * experts; i += warps * kWarp) {
    block_counts[i] = 0;
  }
  __syncthreads();

  float total[N] = {};
  WarpCounts own_counts;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * warps;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.y; t < tokens;
       t += stride) {
    const T* from = logits + t * experts;
    const bool counts = mask == nullptr || mask[t];
    const LaneToken<N> token(from, experts, sigmoid_mode);
    int orders[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int e = LaneToken<N>::expert(i);
      float choice = sigmoid_mode ? token.share[i] : token.logit[i];
      if (bias != nullptr && e < experts) choice = token.share[i] + bias[e];
      orders[i] = e < experts ? Order<float>::of(choice) : kNoOrder;
      if (counts) total[i] += token.probability(i, sigmoid_mode);
    }
    if (counts) own_counts.add(token);
    if (routing.num_groups != routing.top_groups) close_groups(routing, bias != nullptr, orders);
    for (int k = 0; k < top_k; ++k) {
      const LaneBest best(orders);
      if (threadIdx.x == 0) chosen[k] = static_cast<int>(best.id);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (static_cast<unsigned>(LaneToken<N>::expert(i)) == best.id) orders[i] = kNoOrder;
      }
    }
    __syncwarp();
    const auto logit_of = [&](int k) { return static_cast<float>(from[chosen[k]]); };
    const Chosen<float> all(routing.mode, top_k, logit_of);
    for (int k = threadIdx.x; k < top_k; k += kWarp) {
      const int e = chosen[k];
      ids[t * top_k + k] = e;
      scores[t * top_k + k] = all.score(routing.mode, token, logit_of(k)) * scale;
      atomicAdd(&block_chosen[e], 1);
      if (counts && k < routing.choices) atomicAdd(&block_counted[e], 1);
    }
    __syncwarp();  // the next token overwrites what lanes read of each other
  }
#pragma unroll
  for (int i = 0; i < N; ++i) totals[threadIdx.y][LaneToken<N>::expert(i)] = total[i];
  __syncthreads();
  write_part(parts, experts, block_chosen, block_counted, own_counts,
             [&](int e, int warp) { return totals[warp][e]; });
}

}  // namespace unimoe
