// Modes and argument checks of the router, shared by all devices.
#pragma once

#include <optional>
#include <string>

#include "check.h"

namespace unimoe {

// Keeps renormalised sigmoid scores finite when all of them underflow, as DeepSeek-V3 does.
constexpr double kTiny = 1e-20;

enum class Mode { kTopkSoftmax, kSoftmaxTopk, kSoftmaxTopkRenorm, kSigmoid, kSigmoidRenorm };

inline Mode mode_of(const std::string& mode) {
  if (mode == "topk_softmax") return Mode::kTopkSoftmax;
  if (mode == "softmax_topk") return Mode::kSoftmaxTopk;
  if (mode == "softmax_topk_renorm") return Mode::kSoftmaxTopkRenorm;
  if (mode == "sigmoid") return Mode::kSigmoid;
  UNIMOE_CHECK(mode == "sigmoid_renorm", "mode (", mode, ") is unknown");
  return Mode::kSigmoidRenorm;
}

constexpr bool is_sigmoid(Mode mode) {
  return mode == Mode::kSigmoid || mode == Mode::kSigmoidRenorm;
}

// Number of choices of a token that the load-balancing loss counts.
inline int64_t counted_choices(const std::string& balance, int64_t top_k) {
  UNIMOE_CHECK(balance == "all" || balance == "first", "balance (", balance, ") is unknown");
  return balance == "all" ? top_k : 1;
}

inline void check_mask(const std::optional<Tensor>& token_mask, int64_t tokens) {
  if (!token_mask.has_value()) return;
  UNIMOE_CHECK(token_mask->dim() == 1 && token_mask->size(0) == tokens, "token_mask (shape ",
               shape_of(*token_mask), ") must be [", tokens, "]");
  UNIMOE_CHECK(token_mask->scalar_type() == ScalarType::Bool, "token_mask must be bool");
  UNIMOE_CHECK(token_mask->is_contiguous(), "token_mask must be contiguous");
}

inline void check_router(const Tensor& logits, const std::optional<Tensor>& correction_bias,
                         int64_t top_k, int64_t num_groups, int64_t top_groups) {
  check_matrix(logits, "logits");
  check_floating(logits, "logits");
  const int64_t experts = logits.size(1);
  UNIMOE_CHECK(num_groups >= 1 && experts % num_groups == 0, "num_groups (", num_groups,
               ") must divide num_experts (", experts, ")");
  UNIMOE_CHECK(top_groups >= 1 && top_groups <= num_groups, "top_groups (", top_groups,
               ") must be between 1 and num_groups (", num_groups, ")");
  UNIMOE_CHECK(top_k >= 1 && top_k <= experts / num_groups * top_groups, "top_k (", top_k,
               ") must be between 1 and the experts of top_groups groups");
  if (!correction_bias.has_value()) return;
  UNIMOE_CHECK(correction_bias->dim() == 1 && correction_bias->size(0) == experts,
               "correction_bias (shape ", shape_of(*correction_bias), ") must be [", experts, "]");
  UNIMOE_CHECK(correction_bias->is_contiguous(), "correction_bias must be contiguous");
}

inline void check_router_backward(const Tensor& grad_scores, const Tensor& grad_balancing,
                                  const Tensor& grad_z, const Tensor& logits, const Tensor& ids) {
  check_matrix(logits, "logits");
  check_floating(logits, "logits");
  check_matrix(ids, "ids");
  check_matrix(grad_scores, "grad_scores");
  const int64_t tokens = logits.size(0), top_k = ids.size(1);
  UNIMOE_CHECK(ids.scalar_type() == ScalarType::Int && ids.size(0) == tokens, "ids (shape ",
               shape_of(ids), ") must be int32 of ", tokens, " rows");
  UNIMOE_CHECK(grad_scores.size(0) == tokens && grad_scores.size(1) == top_k, "grad_scores (shape ",
               shape_of(grad_scores), ") must be ", shape_of(ids));
  const bool is_double = logits.scalar_type() == ScalarType::Double;
  for (const Tensor* grad : {&grad_scores, &grad_balancing, &grad_z}) {
    UNIMOE_CHECK(grad->scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float),
                 "gradients must be ", is_double ? "float64" : "float32", " beside these logits");
  }
  UNIMOE_CHECK(grad_balancing.numel() == 1 && grad_z.numel() == 1,
               "gradients of the losses must be scalars");
}

}  // namespace unimoe
