// Operators that other operators call.
#pragma once

#include <tuple>

#include "stable.h"

namespace unimoe {

// row_order, inverse_order, tokens_per_expert and expert_offsets.
using Sorted = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Sorted expert_sort(Tensor ids, int64_t num_experts);

Tensor unpermute(Tensor rows, Tensor inverse_order, Tensor expert_offsets,
                 std::optional<Tensor> scores, int64_t top_k);

}  // namespace unimoe
