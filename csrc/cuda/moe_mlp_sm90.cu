// The first matmul of a layer with its gate, and its backward, for compute capability 9.0.
#include "sm90/checks.h"
#include "sm90/gated_backward.cuh"
#include "sm90/matmuls.h"

namespace unimoe::sm90 {
namespace {

constexpr int kScoreThreads = 256;

// The gradient of the score of routed row n: the sum over its column tiles, in order, or 0 for a
// row of no expert.
__global__ void score_gradient_kernel(const float* __restrict__ score_sums,
                                      const int* __restrict__ inverse_order,
                                      const int* __restrict__ routed_rows,
                                      float* __restrict__ grad_scores, int rows, int column_tiles) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= rows) return;
  const int64_t place = inverse_order[n];
  float sum = 0;
  if (place < *routed_rows) {
    for (int tile = 0; tile < column_tiles; ++tile) {
      sum += score_sums[static_cast<int64_t>(tile) * rows + place];
    }
  }
  grad_scores[n] = sum;
}

void check_gathered(const Tensor& x, const Tensor& offsets, const Tensor& order, int64_t experts,
                    int64_t top_k) {
  check_expert_offsets(offsets, experts, x);
  check_top_k(top_k, "row_order", order.size(0));
  check_routed(order, "row_order", x.size(0) * top_k, x);
}

}  // namespace

void gated(const Tensor& x, const Tensor& gate_up, const Tensor& offsets, const Tensor& order,
           int64_t top_k, Tensor& act, Tensor* hidden) {
  check_rows_matrix(x, "x", x);
  check_weight(gate_up, "gate_up_proj", false, x);
  check_gathered(x, offsets, order, gate_up.size(0), top_k);
  check_rows_matrix(act, "act", x);
  check_shape(act, "act", {order.size(0), act.size(1)});
  check_shape(gate_up, "gate_up_proj", {gate_up.size(0), 2 * act.size(1), x.size(1)});
  if (hidden != nullptr) {
    check_rows_matrix(*hidden, "hidden", x);
    check_shape(*hidden, "hidden", {order.size(0), gate_up.size(1)});
  }
  if (order.size(0) == 0) return;
  RowsArguments arguments{};
  arguments.x = x.const_data_ptr();
  arguments.order = const_data<int>(order);
  arguments.offsets = const_data<int>(offsets);
  arguments.y = mutable_data<uint16_t>(act);
  arguments.hidden = hidden != nullptr ? mutable_data<uint16_t>(*hidden) : nullptr;
  arguments.rows = static_cast<int>(order.size(0));
  arguments.experts = static_cast<int>(gate_up.size(0));
  arguments.inner = static_cast<int>(x.size(1));
  arguments.width = static_cast<int>(act.size(1));
  arguments.top_k = static_cast<int>(top_k);
  const int64_t column_tiles = tiles_of(arguments.width, kTileColumns / 2);
  const LaunchShape shape =
      persistent_shape(most_row_tiles(arguments.rows, arguments.experts) * column_tiles, x);
  const TensorMap map = tensor_map(weight_layout(gate_up, false, kTileColumns / 2));
  dispatch_16_bit(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (hidden != nullptr) {
      launch(matmul_rows_kernel<T, true, Weight::kAlongDepth, Epilogue::kGatedKept>, shape, x, map,
             map, arguments);
    } else {
      launch(matmul_rows_kernel<T, true, Weight::kAlongDepth, Epilogue::kGated>, shape, x, map, map,
             arguments);
    }
  });
}

void gated_backward(const Tensor& grad, const Tensor& down, const Tensor& scores,
                    const Tensor& hidden, const Tensor& offsets, const Tensor& order,
                    const Tensor& inverse, Tensor* grad_hidden, Tensor* weighted,
                    Tensor* grad_scores) {
  check_rows_matrix(grad, "grad", grad);
  check_weight(down, "down_proj", false, grad);
  check_rows_matrix(hidden, "hidden", grad);
  const int64_t rows = hidden.size(0), width = down.size(2);
  check_matrix(scores, "scores");
  const int64_t top_k = scores.size(1);
  check_gathered(grad, offsets, order, down.size(0), top_k);
  check_routed(inverse, "inverse_order", rows, grad);
  check_scores(scores, grad, grad.size(0), top_k);
  check_same_device(scores, "scores", grad);
  check_shape(hidden, "hidden", {order.size(0), 2 * width});
  check_shape(down, "down_proj", {down.size(0), grad.size(1), width});
  if (grad_hidden != nullptr) check_shape(*grad_hidden, "grad_hidden", {rows, 2 * width});
  if (weighted != nullptr) check_shape(*weighted, "weighted", {rows, width});
  if (grad_scores != nullptr) check_shape(*grad_scores, "grad_scores", {grad.size(0), top_k});
  if (rows == 0) return;

  const int column_tiles = tiles_of(static_cast<int>(width), kTileColumns);
  Tensor score_sums = empty({column_tiles, rows}, ScalarType::Float, grad);
  GatedBackwardArguments arguments{};
  arguments.grad = grad.const_data_ptr();
  arguments.order = const_data<int>(order);
  arguments.offsets = const_data<int>(offsets);
  arguments.scores = const_data<float>(scores);
  arguments.hidden = const_data<uint16_t>(hidden);
  arguments.grad_hidden = grad_hidden != nullptr ? mutable_data<uint16_t>(*grad_hidden) : nullptr;
  arguments.weighted = weighted != nullptr ? mutable_data<uint16_t>(*weighted) : nullptr;
  arguments.score_sums = mutable_data<float>(score_sums);
  arguments.rows = static_cast<int>(rows);
  arguments.experts = static_cast<int>(down.size(0));
  arguments.inner = static_cast<int>(grad.size(1));
  arguments.width = static_cast<int>(width);
  arguments.top_k = static_cast<int>(top_k);
  const LaunchShape shape =
      persistent_shape(most_row_tiles(rows, arguments.experts) * column_tiles, grad);
  const TensorMap map = tensor_map(weight_layout(down, false, kTileDepth));
  dispatch_16_bit(grad.scalar_type(), [&](auto element) {
    launch(gated_backward_kernel<decltype(element)>, shape, grad, map, arguments);
  });
  if (grad_scores == nullptr) return;
  LaunchShape by_row;
  by_row.grid = dim3(static_cast<unsigned>(ceil_div<int64_t>(rows, kScoreThreads)));
  by_row.block = dim3(kScoreThreads);
  launch(score_gradient_kernel, by_row, grad, const_data<float>(score_sums),
         const_data<int>(inverse), const_data<int>(offsets) + arguments.experts,
         mutable_data<float>(*grad_scores), rows, column_tiles);
}

}  // namespace unimoe::sm90
