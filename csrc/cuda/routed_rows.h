// Operators on routed rows that other CUDA operators call. The namespace separates them from the
// CPU versions, which have the same names and arguments.
#pragma once

#include <tuple>

#include "stable.h"

namespace unimoe::gpu {

// row_order, inverse_order, tokens_per_expert and expert_offsets.
using Sorted = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Sorted expert_sort(Tensor ids, int64_t num_experts);

// Requires inverse_order rather than row_order: a token is read once and written to its K rows.
Tensor permute(Tensor x, Tensor inverse_order, Tensor expert_offsets, int64_t top_k);

// Without scores every weight is 1.
Tensor unpermute(Tensor rows, Tensor inverse_order, Tensor expert_offsets,
                 std::optional<Tensor> scores, int64_t top_k);

}  // namespace unimoe::gpu
