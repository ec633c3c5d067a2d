// Every expert multiplies its own rows, for any storage format of its weight.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "check.h"
#include "matmul.h"

namespace unimoe {

inline void check_bias(const std::optional<Tensor>& bias, const char* name, const Tensor& x,
                       int64_t experts, int64_t width) {
  if (!bias) return;
  check_matrix(*bias, name);
  UNIMOE_CHECK(bias->size(0) == experts && bias->size(1) == width, name, " (shape ",
               shape_of(*bias), ") must be [", experts, ", ", width, "]");
  UNIMOE_CHECK(bias->scalar_type() == x.scalar_type(), name, " must have the dtype of x");
}

// Maps rows x [N, depth] in expert order to [N, width]; rows of no expert are zero.
// `attach(product, expert)` sets the right operand of a product.
template <typename Attach>
Tensor multiply_groups(const Tensor& x, const Tensor& expert_offsets, int64_t width,
                       const std::optional<Tensor>& bias, Attach&& attach) {
  const int64_t rows = x.size(0), depth = x.size(1), experts = expert_offsets.size(0) - 1;
  Tensor out = empty({rows, width}, x.scalar_type(), x);
  const int32_t* bound = const_data<int32_t>(expert_offsets);
  dispatch_floating(x.scalar_type(), "x", [&](auto element) {
    using T = decltype(element);
    T* to = mutable_data<T>(out);
    std::vector<Product<T>> products;
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t held = bound[e + 1] - bound[e];
      if (held == 0 || width == 0) continue;
      products.push_back({{const_data<T>(x) + bound[e] * depth, depth, 1},
                          {},
                          held,
                          width,
                          depth,
                          bias ? const_data<T>(*bias) + e * width : nullptr,
                          to + bound[e] * width});
      attach(products.back(), e);
    }
    multiply_all(products);
    std::fill(to + bound[experts] * width, to + rows * width, T(0));
  });
  return out;
}

}  // namespace unimoe
