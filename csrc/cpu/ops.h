// Operators that other operators call.
#pragma once

#include <tuple>

#include "stable.h"

namespace unimoe {

// row_order, inverse_order, tokens_per_expert and expert_offsets.
using Sorted = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Sorted expert_sort(Tensor ids, int64_t num_experts);

Tensor permute(Tensor x, Tensor row_order, Tensor expert_offsets, int64_t top_k);

Tensor unpermute(Tensor rows, Tensor inverse_order, Tensor expert_offsets,
                 std::optional<Tensor> scores, int64_t top_k);

Tensor grouped_mm(Tensor x, Tensor weight, Tensor expert_offsets, std::optional<Tensor> bias);

// Gradients of the weight and, if asked for, of the bias.
std::tuple<Tensor, Tensor> grouped_mm_wgrad(Tensor grad, Tensor x, Tensor expert_offsets,
                                            bool has_bias);

}  // namespace unimoe
