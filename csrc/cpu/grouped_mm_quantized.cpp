// Matmul of every expert with its rows, with weights of few bits.
#include <algorithm>

#include "matmul.h"
#include "quantized_weight.h"
#include "run_experts.h"

namespace unimoe {
namespace {

Tensor grouped_mm_quantized(Tensor x, Tensor values, Tensor scales, std::optional<Tensor> zeros,
                            Tensor expert_offsets, std::optional<Tensor> bias, std::string format,
                            bool transposed) {
  check_matrix(x, "x");
  check_floating(x, "x");
  QuantizedWeight weight(values, scales, zeros, format, "weight");
  const int64_t rows = x.size(0), depth = x.size(1), experts = weight.experts();
  const int64_t width = transposed ? weight.depth() : weight.lines();
  UNIMOE_CHECK(depth == (transposed ? weight.lines() : weight.depth()), "x (shape ", shape_of(x),
               ") must have size ", transposed ? weight.lines() : weight.depth(),
               " in dimension 1");
  check_grouped_rows(expert_offsets, experts, rows);
  check_bias(bias, "bias", x, experts, width);
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
      weight.attach(products.back(), e, transposed);
    }
    multiply_all(products);
    std::fill(to + bound[experts] * width, to + rows * width, T(0));
  });
  return out;
}

}  // namespace
}  // namespace unimoe

STABLE_TORCH_LIBRARY_IMPL(unimoe, CPU, m) {
  m.impl("grouped_mm_quantized", TORCH_BOX(&unimoe::grouped_mm_quantized));
}
