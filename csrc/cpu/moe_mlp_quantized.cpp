// The experts of a layer in one operator, with weights of few bits.
#include "check.h"
#include "quantized_weight.h"
#include "run_experts.h"

namespace unimoe {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs moe_mlp_quantized(Tensor x, Tensor ids, Tensor scores, Tensor gate_up_values,
                          Tensor gate_up_scales, std::optional<Tensor> gate_up_zeros,
                          std::string gate_up_format, Tensor down_values, Tensor down_scales,
                          std::optional<Tensor> down_zeros, std::string down_format,
                          std::optional<Tensor> gate_up_bias, std::optional<Tensor> down_bias,
                          std::string activation, double limit, double alpha, bool keep_hidden) {
  const int64_t rows = check_rows_of(x, ids);
  QuantizedWeight first(gate_up_values, gate_up_scales, gate_up_zeros, gate_up_format,
                        "gate_up_proj");
  QuantizedWeight down(down_values, down_scales, down_zeros, down_format, "down_proj");
  Tensor row_order = empty({rows}, ScalarType::Int, x);
  Tensor inverse_order = empty({rows}, ScalarType::Int, x);
  Tensor offsets = empty({first.experts() + 1}, ScalarType::Int, x);
  const Results results{empty({x.size(0), x.size(1)}, x.scalar_type(), x),
                        empty({keep_hidden ? rows : 0, first.lines()}, x.scalar_type(), x),
                        mutable_data<int32_t>(row_order), mutable_data<int32_t>(inverse_order),
                        mutable_data<int32_t>(offsets)};
  run_experts(results, x, first, down, ids, scores, gate_up_bias, down_bias,
              activation_of(activation, limit, alpha));
  return {results.y, results.hidden, row_order, inverse_order, offsets};
}

}  // namespace
}  // namespace unimoe

STABLE_TORCH_LIBRARY_IMPL(unimoe, CPU, m) {
  m.impl("moe_mlp_quantized", TORCH_BOX(&unimoe::moe_mlp_quantized));
}
