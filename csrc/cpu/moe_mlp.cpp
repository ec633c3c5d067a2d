// The experts of a layer in one operator: rows are gathered while they are packed, gate and up are
// computed together and activated in their tile, and the score-weighted rows of
// a token are summed in a fixed order. Pre-activations are written only if they are kept.
//
// The backward recomputes the activation. With scores s, hidden rows H, A = act(H) and the gradient
// dO of each row's token:
//   dA' = dO W2    ds = rowsum(dA' * A) + dO b2    dH = act'(H)[s * dA']
//   dW2 = dO' (s * A)    dW1 = dH' X    dx = sum of a token's rows of dH W1
#include <algorithm>

#include "check.h"
#include "matmul.h"
#include "ops.h"
#include "packed_weight.h"
#include "run_experts.h"

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

// Weights packed by `pack_weight`, or nothing.
struct Packed {
  std::optional<Tensor> gate_up;
  std::optional<Tensor> down;
};

void run_float_experts(const Results& results, const Packed& packed, const Tensor& x,
                       const Tensor& gate_up_proj, const Tensor& down_proj, const Tensor& ids,
                       const Tensor& scores, const std::optional<Tensor>& gate_up_bias,
                       const std::optional<Tensor>& down_bias, const Activation& activation) {
  UNIMOE_CHECK(gate_up_proj.dim() == 3 && gate_up_proj.size(1) % 2 == 0, "gate_up_proj (shape ",
               shape_of(gate_up_proj), ") must be [E, 2F, D]");
  UNIMOE_CHECK(down_proj.dim() == 3, "down_proj (shape ", shape_of(down_proj),
               ") must be [E, D, F]");
  FloatWeight first(gate_up_proj, "gate_up_proj", x, packed.gate_up, "packed_gate_up", 2);
  FloatWeight down(down_proj, "down_proj", x, packed.down, "packed_down", 1);
  run_experts(results, x, first, down, ids, scores, gate_up_bias, down_bias, activation);
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs moe_mlp(Tensor x, Tensor gate_up_proj, Tensor down_proj, Tensor ids, Tensor scores,
                std::optional<Tensor> gate_up_bias, std::optional<Tensor> down_bias,
                std::string activation, double limit, double alpha, bool keep_hidden) {
  const int64_t rows = check_rows_of(x, ids), experts = gate_up_proj.size(0);
  Tensor row_order = empty({rows}, ScalarType::Int, x);
  Tensor inverse_order = empty({rows}, ScalarType::Int, x);
  Tensor offsets = empty({experts + 1}, ScalarType::Int, x);
  const Results results{empty({x.size(0), x.size(1)}, x.scalar_type(), x),
                        empty({keep_hidden ? rows : 0, gate_up_proj.size(1)}, x.scalar_type(), x),
                        mutable_data<int32_t>(row_order), mutable_data<int32_t>(inverse_order),
                        mutable_data<int32_t>(offsets)};
  run_float_experts(results, {}, x, gate_up_proj, down_proj, ids, scores, gate_up_bias, down_bias,
                    activation_of(activation, limit, alpha));
  return {results.y, results.hidden, row_order, inverse_order, offsets};
}

Tensor moe_mlp_inference(Tensor x, Tensor gate_up_proj, Tensor down_proj,
                         std::optional<Tensor> packed_gate_up, std::optional<Tensor> packed_down,
                         Tensor ids, Tensor scores, std::optional<Tensor> gate_up_bias,
                         std::optional<Tensor> down_bias, std::string activation, double limit,
                         double alpha) {
  const int64_t rows = check_rows_of(x, ids);
  std::vector<int32_t> places(2 * rows + gate_up_proj.size(0) + 1);
  const Results results{empty({x.size(0), x.size(1)}, x.scalar_type(), x),
                        empty({0, gate_up_proj.size(1)}, x.scalar_type(), x), places.data(),
                        places.data() + rows, places.data() + 2 * rows};
  run_float_experts(results, {packed_gate_up, packed_down}, x, gate_up_proj, down_proj, ids, scores,
                    gate_up_bias, down_bias, activation_of(activation, limit, alpha));
  return results.y;
}

// Computes dH, s * A and ds from the rows of dA' and H.
struct Activations {
  Tensor grad_hidden;
  Tensor scored;
  Tensor grad_scores;
};

Activations backward_of_activation(const Activation& activation, const Tensor& grad_activated,
                                   const Tensor& hidden, const Tensor& scores,
                                   const Tensor& row_order, int64_t routed) {
  const int64_t rows = hidden.size(0), width = grad_activated.size(1);
  Activations result{empty({rows, 2 * width}, hidden.scalar_type(), hidden),
                     empty({rows, width}, hidden.scalar_type(), hidden),
                     empty({scores.size(0), scores.size(1)}, scores.scalar_type(), scores)};
  const int32_t* order = const_data<int32_t>(row_order);
  const Kernels& fast = kernels();
  dispatch_floating(hidden.scalar_type(), "gate_up_rows", [&](auto element) {
    using T = decltype(element);
    using S = Accumulator<T>;
    const int64_t grain = activated_rows_per_task(width);
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        S& grad_score = mutable_data<S>(result.grad_scores)[order[row]];
        if (row >= routed) {
          grad_score = S(0);
          continue;
        }
        const T* gate = const_data<T>(hidden) + row * 2 * width;
        T* grad_gate = mutable_data<T>(result.grad_hidden) + row * 2 * width;
        grad_score = activate_row_backward<T>(
            activation, fast, width, const_data<S>(scores)[order[row]],
            const_data<T>(grad_activated) + row * width, gate, gate + width,
            mutable_data<T>(result.scored) + row * width, grad_gate, grad_gate + width);
      }
    });
  });
  return result;
}

// Adds dO b2 to the gradient of each row's score, and returns the gradient of the bias.
Tensor backward_of_bias(const Tensor& bias, const Tensor& grad_rows, const Tensor& scores,
                        const Tensor& row_order, const Tensor& offsets, Tensor& grad_scores) {
  const int64_t experts = bias.size(0), width = bias.size(1);
  Tensor grad_bias = empty({experts, width}, bias.scalar_type(), bias);
  const int32_t* order = const_data<int32_t>(row_order);
  const int32_t* bound = const_data<int32_t>(offsets);
  dispatch_floating(bias.scalar_type(), "down_bias", [&](auto element) {
    using T = decltype(element);
    using S = Accumulator<T>;
    torch::stable::parallel_for(0, experts, 1, [&](int64_t begin, int64_t end) {
      std::vector<S> sums(width);
      for (int64_t e = begin; e < end; ++e) {
        const T* own = const_data<T>(bias) + e * width;
        std::fill(sums.begin(), sums.end(), S(0));
        for (int64_t row = bound[e]; row < bound[e + 1]; ++row) {
          const T* grad = const_data<T>(grad_rows) + row * width;
          const S score = const_data<S>(scores)[order[row]];
          S dot = 0;
          for (int64_t d = 0; d < width; ++d) {
            dot += static_cast<S>(grad[d]) * static_cast<S>(own[d]);
            sums[d] += score * static_cast<S>(grad[d]);
          }
          mutable_data<S>(grad_scores)[order[row]] += dot;
        }
        T* to = mutable_data<T>(grad_bias) + e * width;
        for (int64_t d = 0; d < width; ++d) to[d] = static_cast<T>(sums[d]);
      }
    });
  });
  return grad_bias;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients moe_mlp_backward(Tensor grad, Tensor x, Tensor gate_up_proj, Tensor down_proj,
                           Tensor scores, Tensor gate_up_rows, Tensor row_order,
                           Tensor inverse_order, Tensor expert_offsets,
                           std::optional<Tensor> down_bias, std::string activation, double limit,
                           double alpha, std::vector<bool> needs) {
  check_matrix(gate_up_rows, "gate_up_rows");
  check_matrix(scores, "scores");
  UNIMOE_CHECK(needs.size() == 6, "needs (", needs.size(), " entries) must have 6");
  const int64_t top_k = scores.size(1), rows = gate_up_rows.size(0);
  const int64_t experts = gate_up_proj.size(0), hidden_width = down_proj.size(2);
  check_projection(gate_up_proj, "gate_up_proj", x, experts, 2 * hidden_width, x.size(1));
  check_projection(down_proj, "down_proj", x, experts, x.size(1), hidden_width);
  check_bias(down_bias, "down_bias", x, experts, x.size(1));
  check_scores(scores, x, x.size(0), top_k);
  check_grad(grad, x, x.size(0));
  check_rows(row_order, "row_order", rows);
  check_rows(inverse_order, "inverse_order", rows);
  check_grouped_rows(expert_offsets, experts, rows);
  UNIMOE_CHECK(rows == x.size(0) * top_k && gate_up_rows.size(1) == 2 * hidden_width &&
                   gate_up_rows.scalar_type() == x.scalar_type(),
               "gate_up_rows (shape ", shape_of(gate_up_rows), ") must be [", x.size(0) * top_k,
               ", ", 2 * hidden_width, "] in the dtype of x");
  const bool needs_x = needs[0], needs_gate_up = needs[1], needs_down = needs[2];
  const bool needs_gate_up_bias = needs[4], needs_down_bias = needs[5];
  const Activation chosen = activation_of(activation, limit, alpha);
  const int64_t routed = const_data<int32_t>(expert_offsets)[experts];

  const auto nothing = [&] { return empty({0}, x.scalar_type(), x); };
  Tensor grad_x = nothing(), grad_gate_up = nothing(), grad_down = nothing();
  Tensor grad_gate_up_bias = nothing(), grad_down_bias = nothing();
  const Tensor grad_rows = permute(grad, inverse_order, expert_offsets, top_k);
  const Tensor grad_activated = grouped_mm(grad_rows, torch::stable::transpose(down_proj, 1, 2),
                                           expert_offsets, std::nullopt);
  auto [grad_hidden, scored, grad_scores] =
      backward_of_activation(chosen, grad_activated, gate_up_rows, scores, row_order, routed);
  if (down_bias) {
    Tensor grad_bias =
        backward_of_bias(*down_bias, grad_rows, scores, row_order, expert_offsets, grad_scores);
    if (needs_down_bias) grad_down_bias = grad_bias;
  }
  if (needs_down || needs_down_bias) {
    grad_down = std::get<0>(grouped_mm_wgrad(grad_rows, scored, expert_offsets, false));
  }
  if (needs_gate_up || needs_gate_up_bias) {
    const Tensor x_rows = permute(x, inverse_order, expert_offsets, top_k);
    const auto [grad_weight, grad_bias] =
        grouped_mm_wgrad(grad_hidden, x_rows, expert_offsets, needs_gate_up_bias);
    grad_gate_up = grad_weight;
    if (needs_gate_up_bias) grad_gate_up_bias = grad_bias;
  }
  if (needs_x) {
    const Tensor grad_x_rows = grouped_mm(grad_hidden, torch::stable::transpose(gate_up_proj, 1, 2),
                                          expert_offsets, std::nullopt);
    grad_x = unpermute(grad_x_rows, inverse_order, expert_offsets, std::nullopt, top_k);
  }
  return {
      grad_x,        grad_gate_up, grad_down, needs[3] ? grad_scores : nothing(), grad_gate_up_bias,
      grad_down_bias};
}

}  // namespace
}  // namespace unimoe

STABLE_TORCH_LIBRARY_IMPL(unimoe, CPU, m) {
  m.impl("moe_mlp", TORCH_BOX(&unimoe::moe_mlp));
  m.impl("moe_mlp_inference", TORCH_BOX(&unimoe::moe_mlp_inference));
  m.impl("moe_mlp_backward", TORCH_BOX(&unimoe::moe_mlp_backward));
}
