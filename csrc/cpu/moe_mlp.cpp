// The experts of a layer in one operator: rows are gathered while they are packed, gate and up are
// multiplied together and activated before they leave the registers' tile, and the rows of a token
// are summed by score in a fixed order. The pre-activations are written only if they are kept.
#include "check.h"
#include "matmul.h"
#include "ops.h"

namespace unimoe {
namespace {

void check_projection(const Tensor& weight, const char* name, const Tensor& x, int64_t experts,
                      int64_t lines, int64_t depth) {
  UNIMOE_CHECK(weight.dim() == 3 && weight.size(0) == experts && weight.size(1) == lines &&
                   weight.size(2) == depth,
               name, " (shape ", shape_of(weight), ") must be [", experts, ", ", lines, ", ", depth,
               "]");
  UNIMOE_CHECK(weight.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
}

void check_bias(const std::optional<Tensor>& bias, const char* name, const Tensor& x,
                int64_t experts, int64_t width) {
  if (!bias) return;
  check_matrix(*bias, name);
  UNIMOE_CHECK(bias->size(0) == experts && bias->size(1) == width, name, " (shape ",
               shape_of(*bias), ") must be [", experts, ", ", width, "]");
  UNIMOE_CHECK(bias->scalar_type() == x.scalar_type(), name, " must have the dtype of x");
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs moe_mlp(Tensor x, Tensor gate_up_proj, Tensor down_proj, Tensor ids, Tensor scores,
                std::optional<Tensor> gate_up_bias, std::optional<Tensor> down_bias,
                std::string activation, double limit, double alpha, bool keep_hidden) {
  check_matrix(x, "x");
  check_floating(x, "x");
  check_matrix(ids, "ids");
  const int64_t tokens = x.size(0), width = x.size(1), top_k = ids.size(1);
  UNIMOE_CHECK(ids.size(0) == tokens && ids.scalar_type() == ScalarType::Int, "ids (shape ",
               shape_of(ids), ") must be int32 of ", tokens, " rows");
  UNIMOE_CHECK(gate_up_proj.dim() == 3 && gate_up_proj.size(1) % 2 == 0, "gate_up_proj (shape ",
               shape_of(gate_up_proj), ") must be [E, 2F, D]");
  const int64_t experts = gate_up_proj.size(0), hidden_width = gate_up_proj.size(1) / 2;
  check_projection(gate_up_proj, "gate_up_proj", x, experts, 2 * hidden_width, width);
  check_projection(down_proj, "down_proj", x, experts, width, hidden_width);
  check_bias(gate_up_bias, "gate_up_bias", x, experts, 2 * hidden_width);
  check_bias(down_bias, "down_bias", x, experts, width);
  check_scores(scores, x, tokens, top_k);
  const Activation chosen = activation_of(activation, limit, alpha);

  const int64_t rows = tokens * top_k;
  const auto [row_order, inverse_order, counts, offsets] =
      expert_sort(torch::stable::view(ids, {rows}), experts);
  Tensor hidden = empty({keep_hidden ? rows : 0, 2 * hidden_width}, x.scalar_type(), x);
  Tensor activated = empty({rows, hidden_width}, x.scalar_type(), x);
  Tensor out = empty({rows, width}, x.scalar_type(), x);
  const int32_t* bound = const_data<int32_t>(offsets);

  dispatch_floating(x.scalar_type(), "x", [&](auto element) {
    using T = decltype(element);
    T* hidden_data = mutable_data<T>(hidden);
    T* activated_data = mutable_data<T>(activated);
    std::vector<Product<T>> up, down;
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t first = bound[e], held = bound[e + 1] - bound[e];
      if (held == 0) continue;
      Product<T> product{
          {const_data<T>(x), width, 1, const_data<int32_t>(row_order) + first, top_k},
          {const_data<T>(gate_up_proj) + e * gate_up_proj.stride(0), gate_up_proj.stride(1),
           gate_up_proj.stride(2)},
          held,
          hidden_width,
          width,
          gate_up_bias ? const_data<T>(*gate_up_bias) + e * 2 * hidden_width : nullptr,
          activated_data + first * hidden_width,
          &chosen,
          keep_hidden ? hidden_data + first * 2 * hidden_width : nullptr};
      if (hidden_width != 0) up.push_back(product);
      if (width != 0) {
        down.push_back({{activated_data + first * hidden_width, hidden_width, 1},
                        {const_data<T>(down_proj) + e * down_proj.stride(0), down_proj.stride(1),
                         down_proj.stride(2)},
                        held,
                        width,
                        hidden_width,
                        down_bias ? const_data<T>(*down_bias) + e * width : nullptr,
                        mutable_data<T>(out) + first * width});
      }
    }
    multiply_all(up);
    multiply_all(down);
    if (keep_hidden) {
      std::fill(hidden_data + bound[experts] * 2 * hidden_width,
                hidden_data + rows * 2 * hidden_width, T(0));
    }
  });
  return {unpermute(out, inverse_order, offsets, scores, top_k), hidden, row_order, inverse_order,
          offsets};
}

}  // namespace
}  // namespace unimoe

STABLE_TORCH_LIBRARY_IMPL(unimoe, CPU, m) { m.impl("moe_mlp", TORCH_BOX(&unimoe::moe_mlp)); }
