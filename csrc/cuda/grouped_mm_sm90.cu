// Grouped matmul and its weight gradient for compute capability 9.0.
#include "sm90/checks.h"
#include "sm90/matmuls.h"
#include "sm90/weight_gradient.cuh"

namespace unimoe {
namespace sm90 {
namespace {

template <typename T, Weight kWeight>
void launch_matmul(const Tensor& x, const TensorMap& weight, const RowsArguments& arguments) {
  const int64_t column_tiles = tiles_of(arguments.width, kTileColumns);
  const LaunchShape shape =
      persistent_shape(most_row_tiles(arguments.rows, arguments.experts) * column_tiles, x);
  launch(matmul_rows_kernel<T, false, kWeight, Epilogue::kPlain>, shape, x,
         tensor_map(rows_layout(x, kTileRows)), weight, arguments);
}

}  // namespace

void matmul_rows(const Tensor& x, const Tensor& weight, const Tensor& offsets, bool zero_tail,
                 Tensor& y) {
  const bool transposed = weight.dim() == 3 && weight.stride(2) != 1;
  check_rows_matrix(x, "x", x);
  check_weight(weight, "weight", transposed, x);
  check_expert_offsets(offsets, weight.size(0), x);
  check_rows_matrix(y, "y", x);
  check_shape(weight, "weight", {weight.size(0), y.size(1), x.size(1)});
  check_shape(y, "y", {x.size(0), weight.size(1)});
  if (x.size(0) == 0) return;
  RowsArguments arguments{};
  arguments.offsets = const_data<int>(offsets);
  arguments.y = mutable_data<uint16_t>(y);
  arguments.rows = static_cast<int>(x.size(0));
  arguments.experts = static_cast<int>(weight.size(0));
  arguments.inner = static_cast<int>(x.size(1));
  arguments.width = static_cast<int>(y.size(1));
  arguments.zero_tail = zero_tail;
  const TensorMap map =
      tensor_map(weight_layout(weight, transposed, transposed ? kTileDepth : kTileColumns / 2));
  dispatch_16_bit(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (transposed) {
      launch_matmul<T, Weight::kAcrossDepth>(x, map, arguments);
    } else {
      launch_matmul<T, Weight::kAlongDepth>(x, map, arguments);
    }
  });
}

void weight_gradient(const Tensor& grad, const Tensor& x, const Tensor& offsets,
                     Tensor& grad_weight) {
  check_rows_matrix(grad, "grad", grad);
  check_rows_matrix(x, "x", grad);
  check_expert_offsets(offsets, grad_weight.size(0), grad);
  check_shape(x, "x", {grad.size(0), x.size(1)});
  check_weight(grad_weight, "grad_weight", false, grad);
  check_shape(grad_weight, "grad_weight", {offsets.size(0) - 1, grad.size(1), x.size(1)});
  UNIMOE_CHECK(grad_weight.is_contiguous(), "grad_weight must be contiguous");
  // Rows of an empty tensor are never read, and the driver may reject its address.
  if (grad.size(0) == 0) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(grad_weight.get()));
    return;
  }
  WeightGradientArguments arguments{};
  arguments.offsets = const_data<int>(offsets);
  arguments.grad_weight = mutable_data<uint16_t>(grad_weight);
  arguments.experts = static_cast<int>(grad_weight.size(0));
  arguments.height = static_cast<int>(grad.size(1));
  arguments.width = static_cast<int>(x.size(1));
  const int64_t tiles = static_cast<int64_t>(arguments.experts) *
                        tiles_of(arguments.height, kTileRows) *
                        tiles_of(arguments.width, kTileColumns);
  dispatch_16_bit(grad.scalar_type(), [&](auto element) {
    launch(weight_gradient_kernel<decltype(element)>, persistent_shape(tiles, grad), grad,
           tensor_map(ragged_layout(grad)), tensor_map(ragged_layout(x)), arguments);
  });
}

}  // namespace sm90

namespace {

Tensor grouped_mm_sm90(Tensor x, Tensor weight, Tensor expert_offsets) {
  check_matrix(x, "x");
  UNIMOE_CHECK(weight.dim() == 3, "weight (shape ", shape_of(weight), ") must be 3-D");
  Tensor y = empty({x.size(0), weight.size(1)}, x.scalar_type(), x);
  sm90::matmul_rows(x, weight, expert_offsets, /*zero_tail=*/true, y);
  return y;
}

Tensor grouped_mm_wgrad_sm90(Tensor grad, Tensor x, Tensor expert_offsets) {
  check_matrix(grad, "grad");
  check_matrix(x, "x");
  check_offsets(expert_offsets);
  Tensor grad_weight =
      empty({expert_offsets.size(0) - 1, grad.size(1), x.size(1)}, x.scalar_type(), x);
  sm90::weight_gradient(grad, x, expert_offsets, grad_weight);
  return grad_weight;
}

}  // namespace
}  // namespace unimoe

STABLE_TORCH_LIBRARY_IMPL(unimoe, CUDA, m) {
  m.impl("grouped_mm_sm90", TORCH_BOX(&unimoe::grouped_mm_sm90));
  m.impl("grouped_mm_wgrad_sm90", TORCH_BOX(&unimoe::grouped_mm_wgrad_sm90));
}
