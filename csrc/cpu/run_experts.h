// The forward of a layer's experts, for any storage format of their weights.
#pragma once

#include <algorithm>
#include <optional>

#include "check.h"
#include "multiply_groups.h"
#include "ops.h"
#include "packed_weight.h"

namespace unimoe {

// Outputs of a call. `hidden` has no rows if pre-activations are not kept.
struct Results {
  Tensor y;
  Tensor hidden;
  int32_t* row_order;
  int32_t* inverse_order;
  int32_t* offsets;
};

inline int64_t check_rows_of(const Tensor& x, const Tensor& ids) {
  check_matrix(x, "x");
  check_floating(x, "x");
  check_matrix(ids, "ids");
  UNIMOE_CHECK(ids.size(0) == x.size(0), "ids (shape ", shape_of(ids), ") must be of ", x.size(0),
               " rows");
  const int64_t rows = x.size(0) * ids.size(1);
  check_top_k(ids.size(1), "ids", rows);
  return rows;
}

// A stacked weight `[E, lines, depth]` of floats, with or without packed panels.
class FloatWeight {
 public:
  FloatWeight(const Tensor& weight, const char* name, const Tensor& x,
              const std::optional<Tensor>& packed, const char* packed_name, int64_t sides)
      : weight_(weight), panels_(packed, packed_name, weight, sides) {
    UNIMOE_CHECK(weight.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
  }

  int64_t experts() const { return weight_.size(0); }
  int64_t lines() const { return weight_.size(1); }
  int64_t depth() const { return weight_.size(2); }

  template <typename T>
  void attach(Product<T>& product, int64_t expert) const {
    product.right = {const_data<T>(weight_) + expert * weight_.stride(0), weight_.stride(1),
                     weight_.stride(2)};
    product.panels = panels_.of_expert(expert);
  }

 private:
  const Tensor& weight_;
  PackedWeight panels_;
};

// `Weight` is a FloatWeight or a QuantizedWeight.
template <typename Weight>
void run_experts(const Results& results, const Tensor& x, Weight& first_weight, Weight& down_weight,
                 const Tensor& ids, const Tensor& scores, const std::optional<Tensor>& gate_up_bias,
                 const std::optional<Tensor>& down_bias, const Activation& activation) {
  const int64_t tokens = x.size(0), width = x.size(1), top_k = ids.size(1);
  const int64_t rows = tokens * top_k;
  const int64_t experts = first_weight.experts(), hidden_width = first_weight.lines() / 2;
  UNIMOE_CHECK(first_weight.lines() % 2 == 0 && first_weight.depth() == width,
               "gate_up_proj (shape [", experts, ", ", first_weight.lines(), ", ",
               first_weight.depth(), "]) must be [E, 2F, ", width, "]");
  UNIMOE_CHECK(down_weight.experts() == experts && down_weight.lines() == width &&
                   down_weight.depth() == hidden_width,
               "down_proj (shape [", down_weight.experts(), ", ", down_weight.lines(), ", ",
               down_weight.depth(), "]) must be [", experts, ", ", width, ", ", hidden_width, "]");
  check_bias(gate_up_bias, "gate_up_bias", x, experts, 2 * hidden_width);
  check_bias(down_bias, "down_bias", x, experts, width);
  check_scores(scores, x, tokens, top_k);

  sort_rows(ids, experts, results.row_order, results.inverse_order, results.offsets);
  const int32_t* bound = results.offsets;
  const bool keep_hidden = results.hidden.size(0) != 0;
  dispatch_floating(x.scalar_type(), "x", [&](auto element) {
    using T = decltype(element);
    // Activations, then what comes of them.
    const int64_t numbers = rows * (hidden_width + width);
    const auto memory = allocate((numbers * static_cast<int64_t>(sizeof(T)) + 3) / 4);
    T* activated = reinterpret_cast<T*>(memory.get());
    T* out = activated + rows * hidden_width;
    T* hidden = mutable_data<T>(results.hidden);
    std::vector<Product<T>> up, down;
    up.reserve(experts);
    down.reserve(experts);
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t first = bound[e], held = bound[e + 1] - bound[e];
      if (held == 0) continue;
      if (hidden_width != 0) {
        up.push_back({{const_data<T>(x), width, 1, results.row_order + first, top_k},
                      {},
                      held,
                      hidden_width,
                      width,
                      gate_up_bias ? const_data<T>(*gate_up_bias) + e * 2 * hidden_width : nullptr,
                      activated + first * hidden_width,
                      &activation,
                      keep_hidden ? hidden + first * 2 * hidden_width : nullptr});
        first_weight.attach(up.back(), e);
      }
      if (width != 0) {
        down.push_back({{activated + first * hidden_width, hidden_width, 1},
                        {},
                        held,
                        width,
                        hidden_width,
                        down_bias ? const_data<T>(*down_bias) + e * width : nullptr,
                        out + first * width});
        down_weight.attach(down.back(), e);
      }
    }
    multiply_all(up);
    multiply_all(down);
    if (keep_hidden) {
      std::fill(hidden + bound[experts] * 2 * hidden_width, hidden + rows * 2 * hidden_width, T(0));
    }
    sum_token_rows(out, results.inverse_order, bound[experts], const_data<Accumulator<T>>(scores),
                   tokens, top_k, width, mutable_data<T>(results.y));
  });
}

}  // namespace unimoe
