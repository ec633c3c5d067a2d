// Selection of experts, their scores, and the auxiliary losses, token by token.
//
// Tokens are distributed in blocks of fixed size and the sums of the blocks are added in order, so
// that the losses do not depend on the number of threads.
#include "router_token.h"

namespace unimoe {
namespace {

constexpr int64_t kTokensPerBlock = 64;
// Minimum number of logits per thread; with fewer, distributing them takes longer than routing.
constexpr int64_t kLogitsPerTask = 8192;

int64_t blocks_of(int64_t tokens) { return (tokens + kTokensPerBlock - 1) / kTokensPerBlock; }

int64_t blocks_per_task(int64_t experts) {
  return std::max<int64_t>(1, kLogitsPerTask / (kTokensPerBlock * std::max<int64_t>(1, experts)));
}

// The tokens that the losses include.
struct Mask {
  const bool* mask = nullptr;
  int64_t counted;  // at least 1, because it is a divisor

  Mask(const std::optional<Tensor>& token_mask, int64_t tokens) : counted(tokens) {
    check_mask(token_mask, tokens);
    if (token_mask.has_value()) {
      mask = const_data<bool>(*token_mask);
      counted = std::count(mask, mask + tokens, true);
    }
    counted = std::max<int64_t>(1, counted);
  }

  bool operator()(int64_t token) const { return mask == nullptr || mask[token]; }
};

// The correction bias in the dtype of the scores.
template <typename S>
std::vector<S> bias_of(const std::optional<Tensor>& correction_bias) {
  std::vector<S> bias;
  if (!correction_bias.has_value()) return bias;
  dispatch_floating(correction_bias->scalar_type(), "correction_bias", [&](auto element) {
    using B = decltype(element);
    const B* from = const_data<B>(*correction_bias);
    bias.assign(from, from + correction_bias->size(0));
  });
  return bias;
}

using Routed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Routed topk_router(Tensor logits, std::optional<Tensor> correction_bias,
                   std::optional<Tensor> token_mask, int64_t top_k, std::string mode,
                   int64_t num_groups, int64_t top_groups, double scale, std::string balance) {
  check_router(logits, correction_bias, top_k, num_groups, top_groups);
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  const Routing routing{mode_of(mode), experts, top_k, num_groups, top_groups, scale};
  const int64_t choices = counted_choices(balance, top_k);
  const Mask counts_in_losses(token_mask, tokens);
  const bool is_double = logits.scalar_type() == ScalarType::Double;
  const ScalarType score_dtype = is_double ? ScalarType::Double : ScalarType::Float;

  Tensor scores = empty({tokens, top_k}, score_dtype, logits);
  Tensor ids = empty({tokens, top_k}, ScalarType::Int, logits);
  Tensor tokens_per_expert = empty({experts}, ScalarType::Int, logits);
  Tensor load_balancing_loss = empty({}, score_dtype, logits);
  Tensor router_z_loss = empty({}, score_dtype, logits);

  const int64_t blocks = blocks_of(tokens);
  const Kernels& fast = kernels();
  std::vector<int32_t> chosen(blocks * experts, 0), counted(blocks * experts, 0);
  std::vector<double> probability(blocks * experts, 0), squares(blocks, 0);

  dispatch_floating(logits.scalar_type(), "logits", [&](auto element) {
    using T = decltype(element);
    using S = Accumulator<T>;
    const std::vector<S> bias = bias_of<S>(correction_bias);
    const S* bias_data = correction_bias.has_value() ? bias.data() : nullptr;
    const T* from = const_data<T>(logits);
    S* to = mutable_data<S>(scores);
    int32_t* id = mutable_data<int32_t>(ids);
    const auto route = [&](int64_t begin, int64_t end) {
      Token<S> token(experts);
      for (int64_t block = begin; block < end; ++block) {
        double* block_probability = probability.data() + block * experts;
        const int64_t last = std::min(tokens, (block + 1) * kTokensPerBlock);
        for (int64_t t = block * kTokensPerBlock; t < last; ++t) {
          int32_t* own = id + t * top_k;
          token.read(fast, routing.mode, experts, from + t * experts);
          choose_experts(routing, token, bias_data, own);
          score(routing.mode, token, top_k, own, to + t * top_k);
          for (int64_t k = 0; k < top_k; ++k) {
            to[t * top_k + k] *= S(scale);
            ++chosen[block * experts + own[k]];
          }
          if (!counts_in_losses(t)) continue;
          for (int64_t k = 0; k < choices; ++k) ++counted[block * experts + own[k]];
          for (int64_t e = 0; e < experts; ++e) {
            block_probability[e] += token.probability(routing.mode, e);
          }
          const double z = token.logsumexp();
          squares[block] += z * z;
        }
      }
    };
    torch::stable::parallel_for(0, blocks, blocks_per_task(experts), route);

    int32_t* totals = mutable_data<int32_t>(tokens_per_expert);
    const double n = static_cast<double>(counts_in_losses.counted);
    double balancing = 0, z = 0;
    for (int64_t e = 0; e < experts; ++e) {
      double count = 0, mean = 0;
      totals[e] = 0;
      for (int64_t block = 0; block < blocks; ++block) {
        totals[e] += chosen[block * experts + e];
        count += counted[block * experts + e];
        mean += probability[block * experts + e];
      }
      balancing += count / (n * choices) * (mean / n);
    }
    for (int64_t block = 0; block < blocks; ++block) z += squares[block];
    *mutable_data<S>(load_balancing_loss) = static_cast<S>(experts * balancing);
    *mutable_data<S>(router_z_loss) = static_cast<S>(z / n);
  });
  return {scores, ids, tokens_per_expert, load_balancing_loss, router_z_loss};
}

// out = the gradient of one token's logits. `grad_scores` are the gradients of its scores times the
// scale, `grad_probability` is the gradient of the load-balancing loss with respect to its
// probabilities (null if the token is masked out), and `slope` is twice the gradient of the z-loss
// divided by the number of tokens.
template <typename S, typename T>
void backward_token(Mode mode, const Token<S>& token, int64_t experts, int64_t top_k,
                    const int32_t* ids, S* grad_scores, const S* grad_probability, S slope,
                    S* scores, S* grad, T* out) {
  const bool sigmoid = is_sigmoid(mode);
  std::fill_n(grad, experts, S(0));
  if (grad_probability != nullptr) {
    S inner = 0;
    for (int64_t e = 0; e < experts; ++e) inner += grad_probability[e] * token.probability(mode, e);
    for (int64_t e = 0; e < experts; ++e) {
      const S centred = grad_probability[e] - inner;
      grad[e] = sigmoid ? centred / token.sigmoid_sum : token.softmax(e) * centred;
    }
  }
  if (mode == Mode::kSoftmaxTopk) {
    S inner = 0;
    for (int64_t k = 0; k < top_k; ++k) inner += grad_scores[k] * token.softmax(ids[k]);
    for (int64_t e = 0; e < experts; ++e) grad[e] -= token.softmax(e) * inner;
    for (int64_t k = 0; k < top_k; ++k) grad[ids[k]] += token.softmax(ids[k]) * grad_scores[k];
  } else if (mode == Mode::kSigmoid) {
    for (int64_t k = 0; k < top_k; ++k) grad[ids[k]] += grad_scores[k];
  } else {
    score(mode, token, top_k, ids, scores);
    S inner = 0, sum = S(kTiny);
    for (int64_t k = 0; k < top_k; ++k) {
      inner += grad_scores[k] * scores[k];
      if (sigmoid) sum += token.sigmoid[ids[k]];
    }
    for (int64_t k = 0; k < top_k; ++k) {
      const S centred = grad_scores[k] - inner;
      grad[ids[k]] += sigmoid ? centred / sum : scores[k] * centred;
    }
  }
  const S z = grad_probability == nullptr ? S(0) : slope * token.logsumexp();
  for (int64_t e = 0; e < experts; ++e) {
    if (sigmoid) grad[e] *= token.sigmoid[e] * (S(1) - token.sigmoid[e]);
    out[e] = static_cast<T>(grad[e] + token.softmax(e) * z);
  }
}

// Number of choices of each expert by the tokens that the losses include.
std::vector<int64_t> count_choices(const int32_t* ids, int64_t tokens, int64_t top_k,
                                   int64_t choices, int64_t experts, const Mask& counts) {
  std::vector<int64_t> counted(experts, 0);
  for (int64_t t = 0; t < tokens; ++t) {
    if (!counts(t)) continue;
    for (int64_t k = 0; k < choices; ++k) ++counted[ids[t * top_k + k]];
  }
  return counted;
}

Tensor topk_router_backward(Tensor grad_scores, Tensor grad_balancing, Tensor grad_z, Tensor logits,
                            Tensor ids, std::optional<Tensor> token_mask, std::string mode,
                            double scale, std::string balance) {
  check_router_backward(grad_scores, grad_balancing, grad_z, logits, ids);
  const int64_t tokens = logits.size(0), experts = logits.size(1), top_k = ids.size(1);
  const int32_t* id = const_data<int32_t>(ids);
  for (int64_t n = 0; n < tokens * top_k; ++n) {
    UNIMOE_CHECK(id[n] >= 0 && id[n] < experts, "ids (", id[n], ") must be in [0, ", experts, ")");
  }
  const Mode kind = mode_of(mode);
  const int64_t choices = counted_choices(balance, top_k);
  const Mask counts_in_losses(token_mask, tokens);
  const std::vector<int64_t> counted =
      count_choices(id, tokens, top_k, choices, experts, counts_in_losses);
  Tensor out = empty({tokens, experts}, logits.scalar_type(), logits);
  const Kernels& fast = kernels();

  dispatch_floating(logits.scalar_type(), "logits", [&](auto element) {
    using T = decltype(element);
    using S = Accumulator<T>;
    const double n = static_cast<double>(counts_in_losses.counted);
    const S slope = S(2 * *const_data<S>(grad_z) / n);
    std::vector<S> grad_probability(experts);
    for (int64_t e = 0; e < experts; ++e) {
      const double fraction = counted[e] / (n * choices);
      grad_probability[e] = S(*const_data<S>(grad_balancing) * experts * fraction / n);
    }
    const T* from = const_data<T>(logits);
    const S* grads = const_data<S>(grad_scores);
    T* to = mutable_data<T>(out);
    const auto backward = [&](int64_t begin, int64_t end) {
      Token<S> token(experts);
      std::vector<S> scaled(top_k), scores(top_k), grad(experts);
      const int64_t last = std::min(tokens, end * kTokensPerBlock);
      for (int64_t t = begin * kTokensPerBlock; t < last; ++t) {
        token.read(fast, kind, experts, from + t * experts);
        for (int64_t k = 0; k < top_k; ++k) scaled[k] = grads[t * top_k + k] * S(scale);
        backward_token(kind, token, experts, top_k, id + t * top_k, scaled.data(),
                       counts_in_losses(t) ? grad_probability.data() : nullptr, slope,
                       scores.data(), grad.data(), to + t * experts);
      }
    };
    torch::stable::parallel_for(0, blocks_of(tokens), blocks_per_task(experts), backward);
  });
  return out;
}

}  // namespace
}  // namespace unimoe

STABLE_TORCH_LIBRARY_IMPL(unimoe, CPU, m) {
  m.impl("topk_router", TORCH_BOX(&unimoe::topk_router));
  m.impl("topk_router_backward", TORCH_BOX(&unimoe::topk_router_backward));
}
