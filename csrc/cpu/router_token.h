// The router for one token: probabilities, selection of experts, and scores.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "router.h"

namespace unimoe {

// out = e^(x - shift); returns the sum.
inline double exponentials(const Kernels&, int64_t count, const double* x, double shift,
                           double* out) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += out[i] = std::exp(x[i] - shift);
  return sum;
}

inline float exponentials(const Kernels& fast, int64_t count, const float* x, float shift,
                          float* out) {
  return fast.exponentials(count, x, shift, out);
}

// The order of torch's sort: NaN is larger than any number.
template <typename S>
bool larger(S a, S b) {
  return a > b || (a != a && b == b);
}

// The positions of the `top` largest of `values`, in descending order; ties go to the lower one.
template <typename S>
void choose(int64_t count, const S* values, int64_t top, int32_t* chosen) {
  int64_t held = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (held == top && !larger(values[i], values[chosen[held - 1]])) continue;
    int64_t at = held < top ? held++ : held - 1;
    for (; at > 0 && larger(values[i], values[chosen[at - 1]]); --at) chosen[at] = chosen[at - 1];
    chosen[at] = static_cast<int32_t>(i);
  }
}

// Arguments shared by all tokens of a call.
struct Routing {
  Mode mode;
  int64_t experts, top_k, num_groups, top_groups;
  double scale;
};

// Room for one token, and what is known of it after `read`.
template <typename S>
struct Token {
  std::vector<S> logit, exponential, sigmoid, choice, group;
  std::vector<int32_t> order;
  S largest = 0, sum = 0, sigmoid_sum = 0;

  explicit Token(int64_t experts)
      : logit(experts),
        exponential(experts),
        sigmoid(experts),
        choice(experts),
        group(experts),
        order(experts) {}

  template <typename T>
  void read(const Kernels& fast, Mode mode, int64_t experts, const T* from) {
    for (int64_t e = 0; e < experts; ++e) logit[e] = static_cast<S>(from[e]);
    largest = *std::max_element(logit.begin(), logit.end());
    sum = exponentials(fast, experts, logit.data(), largest, exponential.data());
    if (!is_sigmoid(mode)) return;
    sigmoid_sum = S(kTiny);
    for (int64_t e = 0; e < experts; ++e) {
      sigmoid[e] = S(1) / (S(1) + std::exp(-logit[e]));
      sigmoid_sum += sigmoid[e];
    }
  }

  S softmax(int64_t expert) const { return exponential[expert] / sum; }

  S logsumexp() const { return largest + std::log(sum); }

  S probability(Mode mode, int64_t expert) const {
    return is_sigmoid(mode) ? sigmoid[expert] / sigmoid_sum : softmax(expert);
  }
};

// Selects the experts of a token after `read`.
template <typename S>
void choose_experts(const Routing& routing, Token<S>& token, const S* bias, int32_t* ids) {
  const int64_t experts = routing.experts;
  if (bias == nullptr && routing.num_groups == routing.top_groups) {
    const std::vector<S>& by = is_sigmoid(routing.mode) ? token.sigmoid : token.logit;
    return choose(experts, by.data(), routing.top_k, ids);
  }
  for (int64_t e = 0; e < experts; ++e) {
    const S plain = is_sigmoid(routing.mode) ? token.sigmoid[e]
                    : bias == nullptr        ? token.logit[e]
                                             : token.softmax(e);
    token.choice[e] = bias == nullptr ? plain : plain + bias[e];
  }
  if (routing.num_groups != routing.top_groups) {
    // DeepSeek-V2 ranks groups by their best expert; V3, which has a bias, by the best two.
    const int64_t size = experts / routing.num_groups;
    const int64_t best = bias == nullptr ? 1 : std::min<int64_t>(2, size);
    for (int64_t g = 0; g < routing.num_groups; ++g) {
      const S* own = token.choice.data() + g * size;
      choose(size, own, best, token.order.data());
      token.group[g] = own[token.order[0]];
      if (best == 2) token.group[g] += own[token.order[1]];
    }
    choose(routing.num_groups, token.group.data(), routing.num_groups, token.order.data());
    for (int64_t rank = routing.top_groups; rank < routing.num_groups; ++rank) {
      std::fill_n(token.choice.begin() + token.order[rank] * size, size, S(-INFINITY));
    }
  }
  choose(experts, token.choice.data(), routing.top_k, ids);
}

// The scores of the chosen experts, before the scale.
template <typename S>
void score(Mode mode, const Token<S>& token, int64_t top_k, const int32_t* ids, S* scores) {
  if (mode == Mode::kSoftmaxTopk || mode == Mode::kSigmoid) {
    for (int64_t k = 0; k < top_k; ++k) {
      scores[k] = is_sigmoid(mode) ? token.sigmoid[ids[k]] : token.softmax(ids[k]);
    }
    return;
  }
  // The softmax over all experts, renormalised over the chosen, is that over the chosen.
  S largest = token.logit[ids[0]];
  for (int64_t k = 1; k < top_k; ++k) largest = std::max(largest, token.logit[ids[k]]);
  S sum = is_sigmoid(mode) ? S(kTiny) : S(0);
  for (int64_t k = 0; k < top_k; ++k) {
    scores[k] = is_sigmoid(mode) ? token.sigmoid[ids[k]] : std::exp(token.logit[ids[k]] - largest);
    sum += scores[k];
  }
  for (int64_t k = 0; k < top_k; ++k) scores[k] /= sum;
}

}  // namespace unimoe
