// Matmul of every expert with its rows, with weights of few bits.
#include "multiply_groups.h"
#include "quantized_weight.h"

namespace unimoe {
namespace {

Tensor grouped_mm_quantized(Tensor x, Tensor values, Tensor scales, std::optional<Tensor> zeros,
                            Tensor expert_offsets, std::optional<Tensor> bias, std::string format,
                            bool transposed) {
  check_matrix(x, "x");
  check_floating(x, "x");
  QuantizedWeight weight(values, scales, zeros, format, "weight");
  const int64_t depth = transposed ? weight.lines() : weight.depth();
  const int64_t width = transposed ? weight.depth() : weight.lines();
  UNIMOE_CHECK(x.size(1) == depth, "x (shape ", shape_of(x), ") must have size ", depth,
               " in dimension 1");
  check_grouped_rows(expert_offsets, weight.experts(), x.size(0));
  check_bias(bias, "bias", x, weight.experts(), width);
  return multiply_groups(x, expert_offsets, width, bias, [&](auto& product, int64_t expert) {
    weight.attach(product, expert, transposed);
  });
}

}  // namespace
}  // namespace unimoe

STABLE_TORCH_LIBRARY_IMPL(unimoe, CPU, m) {
  m.impl("grouped_mm_quantized", TORCH_BOX(&unimoe::grouped_mm_quantized));
}
