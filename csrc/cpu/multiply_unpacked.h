// Products of few lines or columns: operands are read from memory without packing.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "product.h"
#include "tasks.h"

namespace unimoe {

constexpr int64_t kBlock = 64;
constexpr int64_t kFewColumns = 24;
// With this few lines a block may be wider, if enough tasks remain: one long range of memory is
// read faster than many short ones.
constexpr int64_t kStreamedLines = 4;
constexpr int64_t kWidestBlock = 256;
constexpr int64_t kEnoughBlocks = 32;

// Copies the lines of products that gather them, so that they are contiguous.
template <typename T>
std::vector<T> gather_lines(std::vector<Product<T>>& products) {
  int64_t numbers = 0;
  for (const Product<T>& p : products) numbers += p.left.index ? p.lines * p.depth : 0;
  std::vector<T> gathered(numbers);
  T* to = gathered.data();
  for (Product<T>& product : products) {
    if (product.left.index == nullptr) continue;
    T* const start = to;
    for (int64_t line = 0; line < product.lines; ++line) {
      to = std::copy_n(product.left.line(line), product.depth, to);
    }
    product.left = {start, product.depth, 1};
  }
  return gathered;
}

// Products whose operands are both contiguous along depth are computed without packing: packing a
// panel takes as long as multiplying it by about ten lines.
template <typename T>
void multiply_unpacked(std::vector<Product<T>> products, const Kernels& kernels) {
  struct Block {
    int64_t product;
    int64_t first_line;
    int64_t first_column;
  };
  const std::vector<T> gathered = gather_lines(products);
  int64_t all_columns = 0;
  for (const Product<T>& product : products) all_columns += product.columns;
  const int64_t wide = std::clamp(all_columns / kEnoughBlocks, kBlock, kWidestBlock);
  const auto width_of = [&](const Product<T>& p) {
    return p.lines <= kStreamedLines ? wide : kBlock;
  };
  std::vector<Block> blocks;
  for (size_t i = 0; i < products.size(); ++i) {
    for (int64_t c = 0; c < products[i].columns; c += width_of(products[i])) {
      for (int64_t line = 0; line < products[i].lines; line += kBlock) {
        blocks.push_back({static_cast<int64_t>(i), line, c});
      }
    }
  }
  for_each_task(blocks.size(), [&](int64_t task) {
    const auto [index, line, column] = blocks[task];
    const Product<T>& product = products[index];
    const int64_t lines = std::min(kBlock, product.lines - line);
    const int64_t columns = std::min(width_of(product), product.columns - column);
    float block[2][kBlock * kBlock];
    float* const sums[2] = {block[0], block[1]};
    const T* left = product.left.line(line);
    for (int64_t side = 0; side < product.sides(); ++side) {
      const T* right = product.side(side).line(column);
      const int64_t stride = product.right.line_stride;
      if constexpr (std::is_same_v<T, float>) {
        kernels.dot(product.depth, lines, left, right, stride, columns, sums[side]);
      } else {
        kernels.dot_bfloat16(product.depth, lines, bits_of(left), bits_of(right), stride, columns,
                             sums[side]);
      }
    }
    write(product, kernels, sums, columns, line, lines, column, columns);
  });
}

template <typename T>
bool needs_no_packing(const Product<T>& product) {
  return (product.lines <= kFewLines || product.columns <= kFewColumns) &&
         product.left.depth_stride == 1 && product.left.line_stride == product.depth &&
         product.right.depth_stride == 1;
}

}  // namespace unimoe
