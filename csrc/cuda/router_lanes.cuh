// A token of the router in the registers of a warp: float32 sums, and at most kMostLaneExperts
// experts, of which a lane has N.
#pragma once

#include "router_token.cuh"

namespace unimoe {

constexpr int kMostLaneExperts = 512;

// Resident blocks per multiprocessor. Without this bound, the compiler spills registers for more.
template <int N>
constexpr int kMinBlocks = N > 8 ? 2 : (N > 4 ? 3 : 4);

template <int N>
struct LaneToken : TokenSums<float> {
  float logit[N];
  float share[N];  // the softmax, and in sigmoid modes the sigmoid

  static __device__ int expert(int i) { return static_cast<int>(threadIdx.x) + kWarp * i; }

  template <typename T>
  __device__ LaneToken(const T* from, int experts, bool sigmoid_mode) {
    int order = std::numeric_limits<int>::lowest();
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool exists = expert(i) < experts;
      logit[i] = exists ? static_cast<float>(from[expert(i)]) : 0;
      if (exists) order = max(order, Order<float>::of(logit[i]));
    }
    largest = Order<float>::value_of(__reduce_max_sync(kFullWarp, order));
    float exponentials = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      share[i] = expert(i) < experts ? exp(logit[i] - largest) : 0;
      exponentials += share[i];
    }
    sum = warp_sum(exponentials);
    sigmoid_sum = 0;
    if (sigmoid_mode) {
      float sigmoids = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        share[i] = expert(i) < experts ? sigmoid_of(logit[i]) : 0;
        sigmoids += share[i];
      }
      sigmoid_sum = warp_sum(sigmoids) + static_cast<float>(kTiny);
      return;
    }
    const float scale = 1 / sum;
#pragma unroll
    for (int i = 0; i < N; ++i) share[i] *= scale;
  }

  // Of all experts.
  __device__ float probability(int i, bool sigmoid_mode) const {
    return sigmoid_mode ? share[i] / sigmoid_sum : share[i];
  }
};

// Calls `body` with N for so many experts, as a type.
template <typename Body>
void dispatch_lanes(int64_t experts, Body&& body) {
  if (experts <= 1 * kWarp) return body(std::integral_constant<int, 1>{});
  if (experts <= 2 * kWarp) return body(std::integral_constant<int, 2>{});
  if (experts <= 4 * kWarp) return body(std::integral_constant<int, 4>{});
  if (experts <= 8 * kWarp) return body(std::integral_constant<int, 8>{});
  return body(std::integral_constant<int, kMostLaneExperts / kWarp>{});
}

}  // namespace unimoe
