// Requirements of the kernels for compute capability 9.0, which Python has already checked.
#pragma once

#include <limits>

#include "check.h"
#include "layout.h"

namespace unimoe::sm90 {

inline void check_16_bit(const Tensor& tensor, const char* name, const Tensor& like) {
  const ScalarType dtype = tensor.scalar_type();
  UNIMOE_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
               " must be bfloat16 or float16");
  UNIMOE_CHECK(dtype == like.scalar_type(), name, " must have the dtype of the first input");
  check_same_device(tensor, name, like);
  UNIMOE_CHECK(tensor.numel() == 0 ||
                   reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kVectorBytes == 0,
               name, " must begin at a multiple of ", kVectorBytes, " bytes");
}

inline void check_vectors(int64_t size, const char* name, const char* which) {
  UNIMOE_CHECK(size >= kVectorElements && size % kVectorElements == 0 && size < (1 << 30), which,
               " of ", name, " (", size, ") must be a positive multiple of ", kVectorElements,
               " below 2^30");
}

// Rows [N, D], contiguous.
inline void check_rows_matrix(const Tensor& rows, const char* name, const Tensor& like) {
  check_matrix(rows, name);
  check_16_bit(rows, name, like);
  check_vectors(rows.size(1), name, "the width");
  // The end of an expert's rows is a coordinate of a map with 2^31 - 1 of them.
  UNIMOE_CHECK(rows.size(0) < std::numeric_limits<int32_t>::max(), name, " (", rows.size(0),
               " rows) must have fewer than 2^31 - 1");
}

inline void check_shape(const Tensor& tensor, const char* name,
                        std::initializer_list<int64_t> expected) {
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  int64_t i = 0;
  for (const int64_t size : expected) same = same && tensor.size(i++) == size;
  if (same) return;
  std::ostringstream sizes;
  for (const int64_t size : expected) sizes << (sizes.tellp() > 0 ? ", " : "") << size;
  throw std::runtime_error(
      join_words(name, " (shape ", shape_of(tensor), ") must be [", sizes.str(), "]"));
}

inline void check_expert_offsets(const Tensor& offsets, int64_t experts, const Tensor& like) {
  check_offsets(offsets);
  check_same_device(offsets, "expert_offsets", like);
  UNIMOE_CHECK(experts >= 1 && experts <= kMostExperts, "the number of experts (", experts,
               ") must be between 1 and ", kMostExperts);
  check_shape(offsets, "expert_offsets", {experts + 1});
}

// Weights [E, F, D] with numbers side by side along D, or `transposed` along F.
inline void check_weight(const Tensor& weight, const char* name, bool transposed,
                         const Tensor& like) {
  UNIMOE_CHECK(weight.dim() == 3, name, " (shape ", shape_of(weight), ") must be 3-D");
  check_16_bit(weight, name, like);
  check_vectors(weight.size(1), name, "the second size");
  check_vectors(weight.size(2), name, "the third size");
  const int64_t dense = weight.stride(transposed ? 1 : 2);
  const int64_t apart = weight.stride(transposed ? 2 : 1);
  UNIMOE_CHECK(dense == 1, name, " must have the stride 1 in its ", transposed ? "second" : "third",
               " dimension, not ", dense);
  constexpr int64_t kMostStride = (int64_t{1} << 40) / kElementBytes;
  const auto fits = [](int64_t stride) {
    return stride > 0 && stride % kVectorElements == 0 && stride < kMostStride;
  };
  UNIMOE_CHECK(fits(apart) && (weight.size(0) == 1 || fits(weight.stride(0))), name,
               " must have strides that are positive multiples of ", kVectorElements);
}

// Order of routed rows, a multiple of the tokens.
inline void check_routed(const Tensor& order, const char* name, int64_t rows, const Tensor& like) {
  check_rows(order, name, rows);
  check_same_device(order, name, like);
}

}  // namespace unimoe::sm90
