// Matmuls of experts with their rows; the implementation depends on size and dtype.
#pragma once

#include <algorithm>
#include <vector>

#include "check.h"
#include "multiply_packed.h"
#include "multiply_quantized.h"
#include "multiply_streamed.h"
#include "multiply_unpacked.h"

namespace unimoe {

// float64, which is for gradient checks, has no fast path.
inline void multiply_line(const Product<double>& product, int64_t line) {
  const double* left = product.left.line(line);
  std::vector<double> sums(product.sides() * product.columns);
  for (int64_t column = 0; column < static_cast<int64_t>(sums.size()); ++column) {
    const double* right = product.right.line(column);
    double sum = product.bias ? product.bias[column] : 0.0;
    for (int64_t k = 0; k < product.depth; ++k) {
      sum += left[k * product.left.depth_stride] * right[k * product.right.depth_stride];
    }
    sums[column] = sum;
  }
  double* out = product.out + line * product.columns;
  if (product.hidden != nullptr) {
    std::copy(sums.begin(), sums.end(), product.hidden + line * 2 * product.columns);
  }
  if (product.activation == nullptr) {
    std::copy(sums.begin(), sums.end(), out);
  } else {
    activate_row(*product.activation, kernels(), product.columns, sums.data(),
                 sums.data() + product.columns, out);
  }
}

inline void multiply_all(const std::vector<Product<double>>& products) {
  for (const Product<double>& product : products) {
    torch::stable::parallel_for(0, product.lines, 1, [&](int64_t begin, int64_t end) {
      for (int64_t line = begin; line < end; ++line) multiply_line(product, line);
    });
  }
}

// Calls `body` with a unit of the panels in which elements of type T are packed.
template <typename T, typename Body>
void with_units(const Kernels& chosen, Body&& body) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (chosen.multiply_pairs != nullptr) return body(uint32_t());
  }
  body(float());
}

template <typename T>
void multiply_all(const std::vector<Product<T>>& products) {
  const Kernels& chosen = kernels();
  std::vector<Product<T>> streamed, unpacked, packed, quantized;
  for (const Product<T>& product : products) {
    if (product.quantized != nullptr) {
      (streams_quantized(product) ? quantized : packed).push_back(product);
      continue;
    }
    const bool is_half = std::is_same_v<T, Half>;
    const bool as_it_is = !is_half && needs_no_packing(product);
    const bool in_sums = !is_half && !as_it_is && sums_few_rows(product);
    (in_sums ? streamed : as_it_is ? unpacked : packed).push_back(product);
  }
  if constexpr (!std::is_same_v<T, Half>) {
    if (!streamed.empty()) multiply_streamed(streamed, chosen);
    if (!unpacked.empty()) multiply_unpacked(std::move(unpacked), chosen);
  }
  if (!quantized.empty()) multiply_quantized(quantized, chosen);
  if (packed.empty()) return;
  with_units<T>(chosen, [&](auto unit) { PackedMatmul<T, decltype(unit)>(packed, chosen).run(); });
}

inline void check_grouped_rows(const Tensor& expert_offsets, int64_t experts, int64_t rows) {
  check_offsets(expert_offsets);
  UNIMOE_CHECK(expert_offsets.size(0) == experts + 1, "expert_offsets (", expert_offsets.size(0),
               " entries) must have ", experts + 1);
  const int32_t* bound = const_data<int32_t>(expert_offsets);
  UNIMOE_CHECK(bound[0] == 0, "expert_offsets[0] (", bound[0], ") must be 0");
  for (int64_t e = 1; e <= experts; ++e) {
    UNIMOE_CHECK(bound[e] >= bound[e - 1] && bound[e] <= rows, "expert_offsets[", e, "] (",
                 bound[e], ") must be between ", bound[e - 1], " and ", rows);
  }
}

}  // namespace unimoe
