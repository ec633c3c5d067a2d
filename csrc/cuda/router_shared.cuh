// A token of the router in shared memory, for what registers do not hold: float64, and more experts
// or groups. A lane accesses only its own experts' values there.
#pragma once

#include <algorithm>

#include "router_token.cuh"

namespace unimoe {

// A candidate, ordered by value; ties go to the lower id.
template <typename Integer>
struct Candidate {
  Integer order = std::numeric_limits<Integer>::lowest();
  int id = std::numeric_limits<int>::max();

  __device__ bool is_better_than(const Candidate& other) const {
    return order > other.order || (order == other.order && id < other.id);
  }
};

// The best of what the lanes hold, in every lane.
template <typename Integer>
__device__ Candidate<Integer> warp_best(Candidate<Integer> best) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    Candidate<Integer> other;
    other.order = __shfl_xor_sync(kFullWarp, best.order, step);
    other.id = __shfl_xor_sync(kFullWarp, best.id, step);
    if (other.is_better_than(best)) best = other;
  }
  return best;
}

// The best of a lane's own experts from `first` to `last` - 1, without `taken`.
template <typename Integer>
__device__ Candidate<Integer> lane_best(const Integer* orders, int first, int last, int taken) {
  Candidate<Integer> best;
  // The first expert of this lane that is not below `first`.
  int e = first + (static_cast<int>(threadIdx.x) - first % kWarp + kWarp) % kWarp;
  for (; e < last; e += kWarp) {
    const Candidate<Integer> own{orders[e], e};
    if (e != taken && own.is_better_than(best)) best = own;
  }
  return best;
}

// Reads a token's logits into `logit`, and their sigmoids into `sigmoid` unless that is null.
template <typename T, typename S>
__device__ TokenSums<S> read_token(const T* from, int experts, S* logit, S* sigmoid) {
  TokenSums<S> token;
  S own = -std::numeric_limits<S>::infinity();
  for (int e = threadIdx.x; e < experts; e += kWarp) {
    const S value = static_cast<S>(from[e]);
    logit[e] = value;
    own = value > own || value != value ? value : own;
  }
  token.largest = warp_max(own);
  S exponentials = 0, sigmoids = 0;
  for (int e = threadIdx.x; e < experts; e += kWarp) {
    exponentials += exp(logit[e] - token.largest);
    if (sigmoid != nullptr) sigmoids += sigmoid[e] = sigmoid_of(logit[e]);
  }
  token.sum = warp_sum(exponentials);
  token.sigmoid_sum = sigmoid == nullptr ? S(0) : warp_sum(sigmoids) + S(kTiny);
  return token;
}

// The number of warps per block that fit into its shared memory besides `common` bytes.
inline int64_t warps_for(int64_t bytes_of_warp, int64_t common, int64_t experts) {
  const int64_t room = kSharedBytes - kFixedSharedBytes - common;
  const int64_t usable = std::min<int64_t>(kMaxWarps, room / bytes_of_warp);
  if (usable >= 1) return usable;
  UNIMOE_CHECK(bytes_of_warp + common <= kMostSharedBytes - kFixedSharedBytes, "num_experts (",
               experts, ") must be less: a token does not fit into shared memory");
  return 1;
}

}  // namespace unimoe
