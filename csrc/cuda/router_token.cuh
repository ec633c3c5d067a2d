// One token of the router and the warp that works on it. Lane l owns the experts l, l + 32, ...;
// all that is kept of them lies in shared memory, where a lane touches its own experts' values
// only.
#pragma once

#include <algorithm>
#include <limits>

#include "launch.cuh"
#include "router.h"

namespace unimoe {

constexpr int kMaxWarps = 8;

// What all tokens of a call share.
struct RouterCall {
  Mode mode;
  int experts, top_k, num_groups, top_groups, choices;
};

template <typename S>
__device__ S warp_sum(S value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
  return value;
}

template <typename S>
__device__ S warp_max(S value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const S other = __shfl_xor_sync(kFullWarp, value, step);
    value = other > value || other != other ? other : value;
  }
  return value;
}

// Integers in the order of the values: a NaN above infinity, as in torch's sort, and -0 equal to 0.
// The lowest integer is the order of no value.
template <typename S>
struct Order;

template <>
struct Order<float> {
  using Integer = int;
  static __device__ int of(float value) {
    if (value != value) return std::numeric_limits<int>::max();
    const int bits = __float_as_int(value == 0.0f ? 0.0f : value);
    return bits ^ ((bits >> 31) & 0x7fffffff);
  }
  static __device__ float value_of(int order) {
    return __int_as_float(order ^ ((order >> 31) & 0x7fffffff));
  }
};

template <>
struct Order<double> {
  using Integer = long long;
  static __device__ long long of(double value) {
    if (value != value) return std::numeric_limits<long long>::max();
    const long long bits = __double_as_longlong(value == 0.0 ? 0.0 : value);
    return bits ^ ((bits >> 63) & 0x7fffffffffffffffll);
  }
  static __device__ double value_of(long long order) {
    return __longlong_as_double(order ^ ((order >> 63) & 0x7fffffffffffffffll));
  }
};

// A candidate for the choice: by value, among equals by the lower id.
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

// What is known of a token after its logits were read.
template <typename S>
struct WarpToken {
  S largest, sum, sigmoid_sum;

  // Fills `logit`, and `sigmoid` unless it is null.
  template <typename T>
  __device__ void read(const T* from, int experts, S* logit, S* sigmoid) {
    S own = -std::numeric_limits<S>::infinity();
    for (int e = threadIdx.x; e < experts; e += kWarp) {
      const S value = static_cast<S>(from[e]);
      logit[e] = value;
      own = value > own || value != value ? value : own;
    }
    largest = warp_max(own);
    S exponentials = 0, sigmoids = 0;
    for (int e = threadIdx.x; e < experts; e += kWarp) {
      exponentials += exp(logit[e] - largest);
      if (sigmoid != nullptr) sigmoids += sigmoid[e] = S(1) / (S(1) + exp(-logit[e]));
    }
    sum = warp_sum(exponentials);
    sigmoid_sum = sigmoid == nullptr ? S(0) : warp_sum(sigmoids) + S(kTiny);
  }

  __device__ S softmax(S logit) const { return exp(logit - largest) / sum; }

  __device__ S logsumexp() const { return largest + log(sum); }
};

// Of a token's chosen experts: the largest logit, and what divides their scores.
template <typename S>
struct Chosen {
  S largest = 0, sum = 1;

  __device__ Chosen(Mode mode, int top_k, const int* ids, const S* logit, const S* sigmoid) {
    if (mode == Mode::kSoftmaxTopk || mode == Mode::kSigmoid) return;
    if (is_sigmoid(mode)) {
      sum = 0;
      for (int k = threadIdx.x; k < top_k; k += kWarp) sum += sigmoid[ids[k]];
      sum = warp_sum(sum) + S(kTiny);
      return;
    }
    // The softmax over all experts, renormalised over the chosen, is the softmax over these.
    largest = -std::numeric_limits<S>::infinity();
    for (int k = threadIdx.x; k < top_k; k += kWarp) {
      const S value = logit[ids[k]];
      largest = value > largest || value != value ? value : largest;
    }
    largest = warp_max(largest);
    sum = 0;
    for (int k = threadIdx.x; k < top_k; k += kWarp) sum += exp(logit[ids[k]] - largest);
    sum = warp_sum(sum);
  }

  // The score of a chosen expert, before the scale.
  __device__ S score(Mode mode, const WarpToken<S>& token, S logit, S sigmoid) const {
    if (mode == Mode::kSoftmaxTopk) return token.softmax(logit);
    if (is_sigmoid(mode)) return sigmoid / sum;
    return exp(logit - largest) / sum;
  }
};

inline const bool* mask_data(const std::optional<Tensor>& token_mask) {
  return token_mask.has_value() ? const_data<bool>(*token_mask) : nullptr;
}

// As many warps a block as fit into its shared memory beside `common` bytes.
inline int64_t warps_for(int64_t bytes_of_warp, int64_t common, int64_t experts) {
  const int64_t room = kSharedBytes - kFixedSharedBytes - common;
  const int64_t usable = std::min<int64_t>(kMaxWarps, room / bytes_of_warp);
  if (usable >= 1) return usable;
  UNIMOE_CHECK(bytes_of_warp + common <= kMostSharedBytes - kFixedSharedBytes, "num_experts (",
               experts, ") must be less: a token does not fit into shared memory");
  return 1;
}

}  // namespace unimoe
