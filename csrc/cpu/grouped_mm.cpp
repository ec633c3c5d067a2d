// Matmul of every expert with its rows, and the gradients of weight and bias.
#include <type_traits>

#include "multiply_groups.h"
#include "ops.h"

namespace unimoe {

Tensor grouped_mm(Tensor x, Tensor weight, Tensor expert_offsets, std::optional<Tensor> bias) {
  check_matrix(x, "x");
  UNIMOE_CHECK(weight.dim() == 3 && weight.size(2) == x.size(1), "weight (shape ", shape_of(weight),
               ") must be [E, F, ", x.size(1), "]");
  UNIMOE_CHECK(weight.scalar_type() == x.scalar_type(), "weight must have the dtype of x");
  const int64_t experts = weight.size(0), width = weight.size(1);
  check_grouped_rows(expert_offsets, experts, x.size(0));
  check_bias(bias, "bias", x, experts, width);
  return multiply_groups(x, expert_offsets, width, bias, [&](auto& product, int64_t expert) {
    using T = std::remove_pointer_t<decltype(product.out)>;
    product.right = {const_data<T>(weight) + expert * weight.stride(0), weight.stride(1),
                     weight.stride(2)};
  });
}

std::tuple<Tensor, Tensor> grouped_mm_wgrad(Tensor grad, Tensor x, Tensor expert_offsets,
                                            bool has_bias) {
  check_matrix(grad, "grad");
  check_matrix(x, "x");
  const int64_t experts = expert_offsets.size(0) - 1;
  check_grouped_rows(expert_offsets, experts, x.size(0));
  UNIMOE_CHECK(grad.size(0) == x.size(0), "grad (shape ", shape_of(grad), ") must have ", x.size(0),
               " rows");
  UNIMOE_CHECK(grad.scalar_type() == x.scalar_type(), "grad must have the dtype of x");
  const int64_t width = grad.size(1), depth = x.size(1);
  Tensor grad_weight = empty({experts, width, depth}, x.scalar_type(), x);
  Tensor grad_bias = empty({has_bias ? experts : 0, width}, x.scalar_type(), x);
  const int32_t* bound = const_data<int32_t>(expert_offsets);
  dispatch_floating(x.scalar_type(), "x", [&](auto element) {
    using T = decltype(element);
    using Sum = Accumulator<T>;
    T* to = mutable_data<T>(grad_weight);
    std::vector<Product<T>> products;
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t held = bound[e + 1] - bound[e];
      const T* grads = const_data<T>(grad) + bound[e] * width;
      if (has_bias) {
        std::vector<Sum> sums(width, Sum(0));
        for (int64_t row = 0; row < held; ++row) {
          for (int64_t c = 0; c < width; ++c) sums[c] += static_cast<Sum>(grads[row * width + c]);
        }
        T* out = mutable_data<T>(grad_bias) + e * width;
        for (int64_t c = 0; c < width; ++c) out[c] = static_cast<T>(sums[c]);
      }
      if (held == 0) {
        std::fill_n(to + e * width * depth, width * depth, T(0));
      } else if (width != 0 && depth != 0) {
        products.push_back({{grads, 1, width},
                            {const_data<T>(x) + bound[e] * depth, 1, depth},
                            width,
                            depth,
                            held,
                            nullptr,
                            to + e * width * depth});
      }
    }
    multiply_all(products);
  });
  return {grad_weight, grad_bias};
}

}  // namespace unimoe

STABLE_TORCH_LIBRARY_IMPL(unimoe, CPU, m) {
  m.impl("grouped_mm", TORCH_BOX(&unimoe::grouped_mm));
  m.impl("grouped_mm_wgrad", TORCH_BOX(&unimoe::grouped_mm_wgrad));
}
