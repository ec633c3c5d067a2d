// A whole layer in one call: sort, matmuls and combine, and its backward. With few rows and no
// backward, the matmuls are those that stream the weights (compute capability 8.0 or later); all
// others are those for 9.0.
#include <optional>

#include "check.h"
#include "few_rows.h"
#include "routed_rows.h"
#include "sm90/matmuls.h"

namespace unimoe {
namespace {

// Largest mean number of rows per expert for which reading the weights is the bottleneck.
constexpr int64_t kFewRows = 32;

// The routed rows [T, K] as [N], without copying them.
Tensor flattened(const Tensor& ids) {
  const int64_t sizes[] = {ids.numel()}, strides[] = {1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(ids.get(), 1, sizes, strides,
                                                        /*offset_increment=*/0, &handle));
  return Tensor(handle);
}

void check_layer(const Tensor& x, const Tensor& gate_up, const Tensor& down) {
  check_matrix(x, "x");
  UNIMOE_CHECK(gate_up.dim() == 3, "gate_up_proj (shape ", shape_of(gate_up), ") must be 3-D");
  UNIMOE_CHECK(down.dim() == 3, "down_proj (shape ", shape_of(down), ") must be 3-D");
  UNIMOE_CHECK(gate_up.size(0) >= 1 && gate_up.size(0) == down.size(0) &&
                   gate_up.size(1) == 2 * down.size(2) && gate_up.size(2) == x.size(1) &&
                   down.size(1) == x.size(1),
               "gate_up_proj (shape ", shape_of(gate_up), ") and down_proj (shape ", shape_of(down),
               ") must be [E, 2F, ", x.size(1), "] and [E, ", x.size(1), ", F]");
}

using Layer = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Returns y, the pre-activations [N, 2F] (or [0, 2F]), row_order, inverse_order, expert_offsets.
Layer moe_mlp_cuda(Tensor x, Tensor gate_up, Tensor down, Tensor ids, Tensor scores,
                   bool keep_hidden) {
  check_layer(x, gate_up, down);
  check_matrix(ids, "ids");
  const int64_t experts = gate_up.size(0), width = down.size(2), top_k = ids.size(1);
  UNIMOE_CHECK(ids.size(0) == x.size(0), "ids (shape ", shape_of(ids), ") must have ", x.size(0),
               " rows, as x");
  UNIMOE_CHECK(top_k >= 1, "ids (shape ", shape_of(ids), ") must have columns");
  check_scores(scores, x, x.size(0), top_k);
  const int64_t rows = ids.numel();
  const auto [order, inverse, counts, offsets] = gpu::expert_sort(flattened(ids), experts);

  Tensor act = empty({rows, width}, x.scalar_type(), x);
  Tensor out = empty({rows, x.size(1)}, x.scalar_type(), x);
  Tensor hidden = empty({keep_hidden ? rows : 0, 2 * width}, x.scalar_type(), x);
  if (!keep_hidden && rows <= kFewRows * experts) {
    few_rows_gated(x, gate_up, offsets, order, top_k, act);
    few_rows_matmul(act, down, offsets, out);
  } else {
    sm90::gated(x, gate_up, offsets, order, top_k, act, keep_hidden ? &hidden : nullptr);
    sm90::matmul_rows(act, down, offsets, /*zero_tail=*/false, out);
  }
  return {gpu::unpermute(out, inverse, offsets, scores, top_k), hidden, order, inverse, offsets};
}

Tensor moe_mlp_cuda_inference(Tensor x, Tensor gate_up, Tensor down, Tensor ids, Tensor scores) {
  return std::get<0>(moe_mlp_cuda(x, gate_up, down, ids, scores, /*keep_hidden=*/false));
}

// Returns the gradients of x, gate_up_proj, down_proj and scores; those that are not required are
// empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> moe_mlp_cuda_backward(
    Tensor grad, Tensor x, Tensor gate_up, Tensor down, Tensor scores, Tensor hidden, Tensor order,
    Tensor inverse, Tensor offsets, bool needs_x, bool needs_gate_up, bool needs_down,
    bool needs_scores) {
  check_layer(x, gate_up, down);
  check_grad(grad, x, x.size(0));
  check_matrix(scores, "scores");
  const int64_t experts = gate_up.size(0), width = down.size(2), top_k = scores.size(1);
  const int64_t rows = x.size(0) * top_k;
  const ScalarType dtype = x.scalar_type();
  const auto none = [&](ScalarType type) { return empty({0}, type, x); };
  Tensor grad_x = none(dtype), grad_gate_up = none(dtype), grad_down = none(dtype);
  Tensor grad_scores = needs_scores ? empty({x.size(0), top_k}, scores.scalar_type(), x)
                                    : none(scores.scalar_type());

  std::optional<Tensor> grad_hidden, weighted;
  if (needs_x || needs_gate_up) grad_hidden = empty({rows, 2 * width}, dtype, x);
  if (needs_down) weighted = empty({rows, width}, dtype, x);
  if (grad_hidden || weighted || needs_scores) {
    sm90::gated_backward(grad, down, scores, hidden, offsets, order, inverse,
                         grad_hidden ? &*grad_hidden : nullptr, weighted ? &*weighted : nullptr,
                         needs_scores ? &grad_scores : nullptr);
  }
  // A copy of rows in expert order is freed after the matmul that reads it.
  if (needs_down) {
    grad_down = empty({experts, down.size(1), width}, dtype, x);
    sm90::weight_gradient(gpu::permute(grad, inverse, offsets, top_k), *weighted, offsets,
                          grad_down);
    weighted.reset();
  }
  if (needs_gate_up) {
    grad_gate_up = empty({experts, 2 * width, x.size(1)}, dtype, x);
    sm90::weight_gradient(*grad_hidden, gpu::permute(x, inverse, offsets, top_k), offsets,
                          grad_gate_up);
  }
  if (needs_x) {
    Tensor grad_rows = empty({rows, x.size(1)}, dtype, x);
    sm90::matmul_rows(*grad_hidden, torch::stable::transpose(gate_up, 1, 2), offsets,
                      /*zero_tail=*/false, grad_rows);
    grad_x = gpu::unpermute(grad_rows, inverse, offsets, std::nullopt, top_k);
  }
  return {grad_x, grad_gate_up, grad_down, grad_scores};
}

}  // namespace
}  // namespace unimoe

STABLE_TORCH_LIBRARY_IMPL(unimoe, CUDA, m) {
  m.impl("moe_mlp_cuda", TORCH_BOX(&unimoe::moe_mlp_cuda));
  m.impl("moe_mlp_cuda_inference", TORCH_BOX(&unimoe::moe_mlp_cuda_inference));
  m.impl("moe_mlp_cuda_backward", TORCH_BOX(&unimoe::moe_mlp_cuda_backward));
}
