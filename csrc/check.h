// Argument checks of all native operators. They throw std::runtime_error, which becomes a
// RuntimeError in Python, without source paths of the build machine. The public Python functions
// have already checked their arguments; these checks protect memory when operators are called
// through the dispatcher directly.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "stable.h"

#define UNIMOE_CHECK(condition, ...)                               \
  do {                                                             \
    if (!(condition)) {                                            \
      throw std::runtime_error(::unimoe::join_words(__VA_ARGS__)); \
    }                                                              \
  } while (0)

namespace unimoe {

template <typename... Words>
std::string join_words(const Words&... words) {
  std::ostringstream text;
  (text << ... << words);
  return text.str();
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << "]";
  return text.str();
}

inline void check_floating(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  UNIMOE_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                   dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
               name, " must be float32, float64, bfloat16 or float16");
}

inline void check_matrix(const Tensor& tensor, const char* name) {
  UNIMOE_CHECK(tensor.dim() == 2, name, " (shape ", shape_of(tensor), ") must be 2-D");
  UNIMOE_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

inline void check_int32_vector(const Tensor& tensor, const char* name) {
  UNIMOE_CHECK(tensor.dim() == 1, name, " (shape ", shape_of(tensor), ") must be 1-D");
  UNIMOE_CHECK(tensor.scalar_type() == ScalarType::Int, name, " must be int32");
  UNIMOE_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

inline void check_ids_vector(const Tensor& tensor, const char* name) {
  UNIMOE_CHECK(tensor.dim() == 1, name, " (shape ", shape_of(tensor), ") must be 1-D");
  UNIMOE_CHECK(tensor.scalar_type() == ScalarType::Int || tensor.scalar_type() == ScalarType::Long,
               name, " must be int32 or int64");
  UNIMOE_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

inline void check_rows(const Tensor& order, const char* name, int64_t expected) {
  check_int32_vector(order, name);
  UNIMOE_CHECK(order.size(0) == expected, name, " (", order.size(0), " rows) must have ", expected);
}

inline void check_offsets(const Tensor& expert_offsets) {
  check_int32_vector(expert_offsets, "expert_offsets");
  UNIMOE_CHECK(expert_offsets.size(0) >= 1, "expert_offsets must have num_experts + 1 entries");
}

inline void check_top_k(int64_t top_k, const char* name, int64_t rows) {
  UNIMOE_CHECK(top_k >= 1, "top_k (", top_k, ") must be at least 1");
  UNIMOE_CHECK(rows % top_k == 0, name, " (", rows, " rows) must be a multiple of top_k (", top_k,
               ")");
}

inline void check_same_device(const Tensor& tensor, const char* name, const Tensor& first) {
  UNIMOE_CHECK(tensor.device() == first.device(), name,
               " must be on the device of the first input");
}

// Scores have the dtype in which the rows are summed.
inline void check_scores(const Tensor& scores, const Tensor& rows, int64_t tokens, int64_t top_k) {
  check_matrix(scores, "scores");
  UNIMOE_CHECK(scores.size(0) == tokens && scores.size(1) == top_k, "scores (shape ",
               shape_of(scores), ") must be [", tokens, ", ", top_k, "]");
  const bool wide = rows.scalar_type() == ScalarType::Double;
  UNIMOE_CHECK(scores.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
               "scores must be ", wide ? "float64" : "float32", " beside these rows");
}

inline void check_grad(const Tensor& grad, const Tensor& rows, int64_t tokens) {
  check_matrix(grad, "grad");
  UNIMOE_CHECK(grad.size(0) == tokens && grad.size(1) == rows.size(1), "grad (shape ",
               shape_of(grad), ") must be [", tokens, ", ", rows.size(1), "]");
  UNIMOE_CHECK(grad.scalar_type() == rows.scalar_type(), "grad must have the dtype of rows");
}

}  // namespace unimoe
