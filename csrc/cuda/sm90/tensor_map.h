// Tensor maps: what TMA has to know of a tensor in global memory.
#pragma once

#include <array>

#include "check.h"
#include "tile_schedule.h"

namespace unimoe::sm90 {

// A CUtensorMap, without the driver's header.
struct alignas(128) TensorMap {
  uint64_t words[16];
};

// Everything that a map is made of: equal layouts have equal maps. The first dimension is the one
// along which numbers lie side by side; strides are in bytes, of the others.
struct TensorLayout {
  const void* data = nullptr;
  int32_t rank = 0;
  int32_t device = 0;
  bool half = false;  // float16, else bfloat16
  std::array<uint64_t, 4> sizes{};
  std::array<uint64_t, 3> strides{};
  std::array<uint32_t, 4> box{};

  bool operator==(const TensorLayout&) const = default;
};

inline TensorLayout empty_layout(const Tensor& tensor, int32_t rank) {
  TensorLayout layout;
  layout.data = tensor.const_data_ptr();
  layout.rank = rank;
  layout.device = tensor.get_device_index();
  layout.half = tensor.scalar_type() == ScalarType::Half;
  return layout;
}

// Rows [N, D], contiguous, in boxes of `box_rows` by 64.
inline TensorLayout rows_layout(const Tensor& rows, uint32_t box_rows) {
  TensorLayout layout = empty_layout(rows, 2);
  layout.sizes = {static_cast<uint64_t>(rows.size(1)), static_cast<uint64_t>(rows.size(0))};
  layout.strides = {layout.sizes[0] * kElementBytes};
  layout.box = {kBlockColumns, box_rows};
  return layout;
}

// Rows [N, D], contiguous, in boxes of 64 by 64 that end where an expert's rows do: see
// `ragged_place`.
inline TensorLayout ragged_layout(const Tensor& rows) {
  constexpr uint64_t kAnyNumber = 0x7fffffff;
  TensorLayout layout = empty_layout(rows, 4);
  layout.sizes = {static_cast<uint64_t>(rows.size(1)), kRaggedEnd, kAnyNumber, kAnyNumber};
  const uint64_t row_bytes = layout.sizes[0] * kElementBytes;
  layout.strides = {row_bytes, row_bytes, kRaggedSpan - row_bytes};
  layout.box = {kBlockColumns, kTileDepth, 1, 1};
  return layout;
}

// Weights [E, F, D] in boxes of `box_rows` by 64, whose columns lie side by side: those of D, or
// `transposed` those of F.
inline TensorLayout weight_layout(const Tensor& weight, bool transposed, uint32_t box_rows) {
  const int columns = transposed ? 1 : 2, rows = transposed ? 2 : 1;
  TensorLayout layout = empty_layout(weight, 3);
  layout.sizes = {static_cast<uint64_t>(weight.size(columns)),
                  static_cast<uint64_t>(weight.size(rows)), static_cast<uint64_t>(weight.size(0))};
  const auto row_bytes = static_cast<uint64_t>(weight.stride(rows)) * kElementBytes;
  // The stride between experts of a tensor that has one may be anything.
  layout.strides = {row_bytes, weight.size(0) == 1
                                   ? row_bytes * layout.sizes[1]
                                   : static_cast<uint64_t>(weight.stride(0)) * kElementBytes};
  layout.box = {kBlockColumns, box_rows, 1};
  return layout;
}

// The map of a layout. Maps are kept: encoding one costs the host about a microsecond. A map
// depends on no content, so memory that was freed and is used again does no harm.
TensorMap tensor_map(const TensorLayout& layout);

TensorMap encode_tensor_map(const TensorLayout& layout);

}  // namespace unimoe::sm90
