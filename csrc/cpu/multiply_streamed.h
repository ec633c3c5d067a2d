// Products of small depth, such as the gradient of a weight whose expert has few rows: each line of
// the result is a sum of rows, which are read from memory without packing.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "product.h"
#include "tasks.h"

namespace unimoe {

constexpr int64_t kFewSums = 3;
// Rows of a right operand no larger than this are in a cache by the second line.
constexpr int64_t kCachedNumbers = 1 << 15;
constexpr int64_t kNumbersPerTask = 1 << 14;

// Whether the lines of a product are sums of rows, of so few that packing them would cost more.
template <typename T>
bool sums_few_rows(const Product<T>& product) {
  if (product.activation != nullptr || product.bias != nullptr || product.panels != nullptr ||
      product.right.line_stride != 1 || product.right.index != nullptr) {
    return false;
  }
  return product.depth <= kFewSums ||
         (product.lines <= kFewSums && product.depth * product.columns <= kCachedNumbers);
}

template <typename T>
void multiply_streamed(const std::vector<Product<T>>& products, const Kernels& kernels) {
  struct Block {
    const Product<T>* product;
    int64_t first_line;
    int64_t end_line;
  };
  std::vector<Block> blocks;
  for (const Product<T>& product : products) {
    const int64_t numbers = std::max<int64_t>(1, product.columns * product.depth);
    const int64_t lines = std::max<int64_t>(1, kNumbersPerTask / numbers);
    for (int64_t line = 0; line < product.lines; line += lines) {
      blocks.push_back({&product, line, std::min(line + lines, product.lines)});
    }
  }
  for_each_task(blocks.size(), [&](int64_t task) {
    const auto [product, first, end] = blocks[task];
    std::vector<const T*> rows(product->depth);
    std::vector<float> weights(product->depth);
    for (int64_t k = 0; k < product->depth; ++k) {
      rows[k] = product->right.data + k * product->right.depth_stride;
    }
    for (int64_t line = first; line < end; ++line) {
      const T* left = product->left.line(line);
      for (int64_t k = 0; k < product->depth; ++k) {
        weights[k] = static_cast<float>(left[k * product->left.depth_stride]);
      }
      T* out = product->out + line * product->columns;
      if constexpr (std::is_same_v<T, float>) {
        kernels.weighted_sum(product->depth, rows.data(), weights.data(), 0, nullptr,
                             product->columns, out);
      } else {
        kernels.weighted_sum_bfloat16(product->depth,
                                      reinterpret_cast<const uint16_t* const*>(rows.data()),
                                      weights.data(), 0, nullptr, product->columns, bits_of(out));
      }
    }
  });
}

}  // namespace unimoe
