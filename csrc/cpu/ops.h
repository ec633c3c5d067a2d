// Operators that are called by other operators.
#pragma once

#include <tuple>

#include "stable.h"

namespace unimoe {

// row_order, inverse_order, tokens_per_expert and expert_offsets.
using Sorted = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Sorted expert_sort(Tensor ids, int64_t num_experts);

// The same for ids of any shape, int32 or int64, into buffers for the rows and E + 1 offsets.
void sort_rows(const Tensor& ids, int64_t num_experts, int32_t* order, int32_t* inverse,
               int32_t* offsets);

Tensor permute(Tensor x, Tensor inverse_order, Tensor expert_offsets, int64_t top_k);

Tensor unpermute(Tensor rows, Tensor inverse_order, Tensor expert_offsets,
                 std::optional<Tensor> scores, int64_t top_k);

// The same on raw memory. `scores` is null if all are 1.
template <typename T>
void sum_token_rows(const T* rows, const int32_t* inverse, int64_t routed,
                    const Accumulator<T>* scores, int64_t tokens, int64_t top_k, int64_t width,
                    T* out);

Tensor grouped_mm(Tensor x, Tensor weight, Tensor expert_offsets, std::optional<Tensor> bias);

// Gradients of the weight and, if required, of the bias.
std::tuple<Tensor, Tensor> grouped_mm_wgrad(Tensor grad, Tensor x, Tensor expert_offsets,
                                            bool has_bias);

}  // namespace unimoe
