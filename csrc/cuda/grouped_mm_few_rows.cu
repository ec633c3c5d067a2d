// Grouped matmuls for few rows per expert, plain and with a gated activation.
#include <algorithm>

#include "few_rows.h"
#include "few_rows_kernel.cuh"
#include "resident.cuh"

namespace unimoe {
namespace {

constexpr int kElementwiseThreads = 256;
constexpr int64_t kMostSize = int64_t{1} << 30;

// Alignment that 16-byte copies require of an address.
void check_aligned(const Tensor& tensor, const char* name) {
  UNIMOE_CHECK(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kChunkBytes == 0, name,
               " must start at a multiple of ", kChunkBytes, " bytes");
}

void check_x(const Tensor& x) {
  check_matrix(x, "x");
  UNIMOE_CHECK(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half,
               "x must be bfloat16 or float16");
  UNIMOE_CHECK(x.size(1) > 0 && x.size(1) % kChunkElements == 0 && x.size(1) < kMostSize, "x (",
               x.size(1), " columns) must have a positive multiple of ", kChunkElements,
               ", less than ", kMostSize);
  check_aligned(x, "x");
}

void check_weight(const Tensor& weight, const char* name, const Tensor& x) {
  UNIMOE_CHECK(weight.dim() == 3, name, " (shape ", shape_of(weight), ") must be 3-D");
  UNIMOE_CHECK(weight.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
  UNIMOE_CHECK(weight.size(2) == x.size(1), name, " (shape ", shape_of(weight), ") must have ",
               x.size(1), " columns, as x");
  UNIMOE_CHECK(weight.size(1) < kMostSize, name, " (", weight.size(1),
               " rows per expert) must have less than ", kMostSize);
  check_same_device(weight, name, x);
  if (weight.numel() == 0) return;
  UNIMOE_CHECK(weight.stride(2) == 1, name, " (inner stride ", weight.stride(2),
               ") must have inner stride 1");
  for (const int64_t dim : {0, 1}) {
    UNIMOE_CHECK(weight.size(dim) <= 1 || weight.stride(dim) % kChunkElements == 0, name,
                 " (stride ", weight.stride(dim), ") must have rows at multiples of ",
                 kChunkElements, " elements");
  }
  check_aligned(weight, name);
}

void check_offsets_of(const Tensor& offsets, const Tensor& weight, const Tensor& x) {
  check_offsets(offsets);
  UNIMOE_CHECK(offsets.size(0) == weight.size(0) + 1, "expert_offsets (", offsets.size(0),
               " entries) must have ", weight.size(0) + 1);
  check_same_device(offsets, "expert_offsets", x);
}

void check_output(const Tensor& y, const char* name, int64_t rows, int64_t width, const Tensor& x) {
  check_matrix(y, name);
  UNIMOE_CHECK(y.size(0) == rows && y.size(1) == width, name, " (shape ", shape_of(y),
               ") must be [", rows, ", ", width, "]");
  UNIMOE_CHECK(y.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
  check_same_device(y, name, x);
}

const int* last_of(const Tensor& offsets) { return const_data<int>(offsets) + offsets.size(0) - 1; }

LaunchShape elementwise_shape(int64_t elements) {
  const int64_t blocks = ceil_div<int64_t>(elements, kElementwiseThreads);
  UNIMOE_CHECK(blocks < kMostSize * 2, "the output (", elements, " elements) is too large");
  return {dim3(static_cast<unsigned>(blocks)), dim3(kElementwiseThreads)};
}

template <typename Body>
void dispatch_half(ScalarType dtype, Body&& body) {
  if (dtype == ScalarType::BFloat16) {
    body(BFloat16{});
  } else {
    body(Half{});
  }
}

// Arguments have been checked. `order` is null where x is in expert order.
template <bool kGated>
void multiply(const Tensor& x, const Tensor& weight, const Tensor& offsets, const Tensor* order,
              int64_t top_k, Tensor& y) {
  const int64_t rows = y.size(0), width = y.size(1), experts = weight.size(0);
  if (rows == 0 || width == 0 || experts == 0) return;
  UNIMOE_CHECK(rows < kMostSize && experts < kMostSize, "rows (", rows, ") and experts (", experts,
               ") must be less than ", kMostSize);
  const int multiprocessors = count_multiprocessors(x);
  const FewRowsSchedule schedule =
      few_rows_schedule(rows, experts, width, x.size(1), kGated, multiprocessors);
  const int64_t items =
      most_row_tiles(rows, experts, schedule.tile_rows) * schedule.items_of_row_tile();
  UNIMOE_CHECK(items < kMostSize, "x (", rows, " rows of ", experts, " experts) has too many");
  const bool one_pair = schedule.tile_rows == kPairRows;
  const int shared_bytes = one_pair ? kFewRowsSharedBytes<1> : kFewRowsSharedBytes<2>;
  const int64_t resident = int64_t{multiprocessors} * blocks_by_shared_memory(x, shared_bytes);
  const LaunchShape shape{dim3(static_cast<unsigned>(std::min(items, resident))),
                          dim3(kFewRowsThreads), static_cast<size_t>(shared_bytes)};

  const bool split = schedule.parts > 1;
  std::optional<Tensor> partial;
  if (split) {
    partial = empty({schedule.parts, rows, weight.size(1)}, ScalarType::Float, x);
  }
  dispatch_half(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const FewRows<T> problem{schedule,
                             const_data<T>(x),
                             const_data<T>(weight),
                             weight.stride(0),
                             weight.stride(1),
                             const_data<int>(offsets),
                             order ? const_data<int>(*order) : nullptr,
                             static_cast<int>(top_k),
                             static_cast<int>(rows),
                             mutable_data<T>(y),
                             split ? mutable_data<float>(*partial) : nullptr};
    if (one_pair) {
      launch(few_rows_kernel<T, 1, kGated>, shape, x, problem);
    } else {
      launch(few_rows_kernel<T, 2, kGated>, shape, x, problem);
    }
    if (split) {
      launch(add_parts_kernel<T, kGated>, elementwise_shape(rows * width), x, problem.partial,
             last_of(offsets), problem.y, problem.rows, schedule.width, schedule.parts);
    }
  });
}

void clear_tail(const Tensor& offsets, Tensor& y) {
  if (y.numel() == 0) return;
  dispatch_half(y.scalar_type(), [&](auto element) {
    using T = decltype(element);
    launch(clear_tail_kernel<T>, elementwise_shape(y.numel()), y, last_of(offsets),
           mutable_data<T>(y), y.numel(), static_cast<int>(y.size(1)));
  });
}

void check_gated(const Tensor& x, const Tensor& gate_up, const Tensor& offsets, const Tensor& order,
                 int64_t top_k) {
  check_x(x);
  check_weight(gate_up, "gate_up_proj", x);
  UNIMOE_CHECK(gate_up.size(1) % 2 == 0, "gate_up_proj (", gate_up.size(1),
               " rows per expert) must have as many gate rows as up rows");
  check_offsets_of(offsets, gate_up, x);
  UNIMOE_CHECK(top_k >= 1 && top_k < kMostSize, "top_k (", top_k,
               ") must be at least 1 and less than ", kMostSize);
  check_rows(order, "row_order", x.size(0) * top_k);
  check_same_device(order, "row_order", x);
}

void check_matmul(const Tensor& x, const Tensor& weight, const Tensor& offsets) {
  check_x(x);
  check_weight(weight, "weight", x);
  check_offsets_of(offsets, weight, x);
}

Tensor grouped_mm_few_rows(Tensor x, Tensor weight, Tensor expert_offsets) {
  check_matmul(x, weight, expert_offsets);
  Tensor y = empty({x.size(0), weight.size(1)}, x.scalar_type(), x);
  clear_tail(expert_offsets, y);
  multiply<false>(x, weight, expert_offsets, nullptr, 1, y);
  return y;
}

Tensor gated_few_rows(Tensor x, Tensor gate_up_proj, Tensor expert_offsets, Tensor row_order,
                      int64_t top_k) {
  check_gated(x, gate_up_proj, expert_offsets, row_order, top_k);
  Tensor act = empty({row_order.size(0), gate_up_proj.size(1) / 2}, x.scalar_type(), x);
  clear_tail(expert_offsets, act);
  multiply<true>(x, gate_up_proj, expert_offsets, &row_order, top_k, act);
  return act;
}

}  // namespace

void few_rows_gated(const Tensor& x, const Tensor& gate_up, const Tensor& offsets,
                    const Tensor& order, int64_t top_k, Tensor& act) {
  check_gated(x, gate_up, offsets, order, top_k);
  check_output(act, "act", order.size(0), gate_up.size(1) / 2, x);
  multiply<true>(x, gate_up, offsets, &order, top_k, act);
}

void few_rows_matmul(const Tensor& x, const Tensor& weight, const Tensor& offsets, Tensor& y) {
  check_matmul(x, weight, offsets);
  check_output(y, "y", x.size(0), weight.size(1), x);
  multiply<false>(x, weight, offsets, nullptr, 1, y);
}

}  // namespace unimoe

STABLE_TORCH_LIBRARY_IMPL(unimoe, CUDA, m) {
  m.impl("grouped_mm_few_rows", TORCH_BOX(&unimoe::grouped_mm_few_rows));
  m.impl("gated_few_rows", TORCH_BOX(&unimoe::gated_few_rows));
}
