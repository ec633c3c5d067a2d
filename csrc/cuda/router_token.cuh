// One token of the router, processed by one warp. Lane l owns the experts l, l + 32, ...
#pragma once

#include <limits>

#include "launch.cuh"
#include "router.h"

namespace unimoe {

constexpr int kMaxWarps = 8;

// Arguments shared by all tokens of a call.
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

template <typename S>
__device__ S sigmoid_of(S logit) {
  return S(1) / (S(1) + exp(-logit));
}

// Statistics of a token, computed while its logits are read.
template <typename S>
struct TokenSums {
  S largest, sum, sigmoid_sum;

  __device__ S softmax(S logit) const { return exp(logit - largest) / sum; }

  __device__ S logsumexp() const { return largest + log(sum); }
};

// Of a token's chosen experts: the largest logit, and what divides their scores. `logit_of(k)` is
// that of choice k.
template <typename S>
struct Chosen {
  S largest = 0, sum = 1;

  template <typename LogitOf>
  __device__ Chosen(Mode mode, int top_k, const LogitOf& logit_of) {
    if (mode == Mode::kSoftmaxTopk || mode == Mode::kSigmoid) return;
    if (is_sigmoid(mode)) {
      sum = 0;
      for (int k = threadIdx.x; k < top_k; k += kWarp) sum += sigmoid_of(logit_of(k));
      sum = warp_sum(sum) + S(kTiny);
      return;
    }
    // The softmax over all experts, renormalised over the chosen, is that over the chosen.
    largest = -std::numeric_limits<S>::infinity();
    for (int k = threadIdx.x; k < top_k; k += kWarp) {
      const S value = logit_of(k);
      largest = value > largest || value != value ? value : largest;
    }
    largest = warp_max(largest);
    sum = 0;
    for (int k = threadIdx.x; k < top_k; k += kWarp) sum += exp(logit_of(k) - largest);
    sum = warp_sum(sum);
  }

  // The score of a chosen expert, before the scale.
  __device__ S score(Mode mode, const TokenSums<S>& token, S logit) const {
    if (mode == Mode::kSoftmaxTopk) return token.softmax(logit);
    if (is_sigmoid(mode)) return sigmoid_of(logit) / sum;
    return exp(logit - largest) / sum;
  }
};

inline const bool* mask_data(const std::optional<Tensor>& token_mask) {
  return token_mask.has_value() ? const_data<bool>(*token_mask) : nullptr;
}

}  // namespace unimoe
