// Products of few lines with quantised weights: each byte of the weights is read once, and its
// numbers become floats in registers.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "multiply_unpacked.h"
#include "product.h"
#include "tasks.h"

namespace unimoe {

// Whether a product is one of those.
template <typename T>
bool streams_quantized(const Product<T>& product) {
  return product.lines <= kFewLines && !product.transposed;
}

// Lines of the left operand, as the kernel of a format reads them.
template <typename T>
class PreparedLines {
 public:
  PreparedLines(const Product<T>& product, const Kernels& kernels) : kernels_(kernels) {
    const QuantizedRows& rows = *product.quantized;
    const int64_t depth = product.depth, groups = rows.groups();
    pairs_ = std::is_same_v<T, BFloat16> && rows.four_bits && kernels.dot_int4_pairs != nullptr;
    if (rows.zeros != nullptr) sums_.resize(product.lines * groups);
    pairs_ ? bits_.resize(product.lines * depth) : floats_.resize(product.lines * depth);
    std::vector<float> line(depth), unused(depth);
    for (int64_t i = 0; i < product.lines; ++i) {
      const T* from = product.left.line(i);
      for (int64_t k = 0; k < depth; ++k) {
        line[k] = static_cast<float>(from[k * product.left.depth_stride]);
      }
      if constexpr (std::is_same_v<T, BFloat16>) {
        for (int64_t k = 0; pairs_ && k < depth; ++k) {
          bits_[i * depth + k] = from[k * product.left.depth_stride].x;
        }
      }
      if (pairs_ && rows.zeros == nullptr) continue;
      kernels.prepare_line(rows, line.data(), pairs_ ? unused.data() : floats_.data() + i * depth,
                           sums_.data() + i * groups);
    }
  }

  void dot(const QuantizedRows& rows, int64_t columns, int64_t lines, float* sums) const {
    if (pairs_) {
      kernels_.dot_int4_pairs(rows, columns, lines, bits_.data(), sums_.data(), sums);
    } else {
      kernels_.dot_quantized(rows, columns, lines, floats_.data(), sums_.data(), sums);
    }
  }

 private:
  const Kernels& kernels_;
  bool pairs_;
  std::vector<float> floats_, sums_;
  std::vector<uint16_t> bits_;
};

template <typename T>
void multiply_quantized(const std::vector<Product<T>>& products, const Kernels& kernels) {
  struct Block {
    int64_t product;
    int64_t first_column;
  };
  int64_t all_columns = 0;
  for (const Product<T>& product : products) all_columns += product.columns;
  const int64_t width = std::clamp(all_columns / kEnoughBlocks, kBlock, kWidestBlock);
  std::vector<PreparedLines<T>> prepared;
  std::vector<Block> blocks;
  prepared.reserve(products.size());
  for (size_t i = 0; i < products.size(); ++i) {
    prepared.emplace_back(products[i], kernels);
    for (int64_t column = 0; column < products[i].columns; column += width) {
      blocks.push_back({static_cast<int64_t>(i), column});
    }
  }
  for_each_task(blocks.size(), [&](int64_t task) {
    const auto [index, column] = blocks[task];
    const Product<T>& product = products[index];
    const int64_t columns = std::min(width, product.columns - column);
    float block[2][kFewLines * kWidestBlock];
    float* const sums[2] = {block[0], block[1]};
    for (int64_t side = 0; side < product.sides(); ++side) {
      const QuantizedRows rows = product.quantized->from(side * product.columns + column);
      prepared[index].dot(rows, columns, product.lines, sums[side]);
    }
    write(product, kernels, sums, columns, 0, product.lines, column, columns);
  });
}

}  // namespace unimoe
