// Matmuls of experts with their rows.
//
// The left operand (rows in the forward, columns of the gradient for the weight) is packed once, by
// all threads. A task is one expert and some panels of columns: it packs the panels, which then
// stay in the second-level cache, and multiplies them with all panels on the left. Sums stay in
// registers over the whole depth, so that each result is rounded once and the order of additions is
// fixed.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <vector>

#include "activation.h"
#include "check.h"
#include "kernels.h"
#include "pack.h"

namespace unimoe {

constexpr int64_t kMaxTile = 8 * 48;
constexpr int64_t kBlock = 64;
constexpr int64_t kFewLines = 64;
constexpr int64_t kFewColumns = 24;
constexpr int64_t kAlignment = 64;
// Panels on the left that one task packs: their lines share cache lines where depth is strided.
constexpr int64_t kLeftPanels = 8;
// Of 32 bits; half of a second-level cache of 1 MiB.
constexpr int64_t kPanelUnits = 128 * 1024;
constexpr int64_t kFewestTasks = 16;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Uninitialised memory that starts at a cache line.
inline std::unique_ptr<uint32_t, Free> allocate(int64_t units) {
  const int64_t bytes =
      (std::max<int64_t>(1, units) * 4 + kAlignment - 1) / kAlignment * kAlignment;
  void* memory = std::aligned_alloc(kAlignment, bytes);
  UNIMOE_CHECK(memory != nullptr, "out of memory: ", bytes, " bytes for packed operands");
  return std::unique_ptr<uint32_t, Free>(static_cast<uint32_t*>(memory));
}

// Every thread takes the next task until none is left: tasks may differ a lot in size.
template <typename Body>
void for_each_task(int64_t tasks, Body&& body) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < tasks; task = next++) body(task);
  });
}

// One product of an expert, rows of `out` one after the other:
//   out[line of left][line of right] = sum over depth + bias.
// With an activation, `right` and `bias` hold `columns` gates and then as many ups, and
//   out = act(gate) * up,
// while `hidden`, unless it is null, gets both, [lines][2 * columns].
template <typename T>
struct Product {
  Operand<T> left;
  Operand<T> right;
  int64_t lines;
  int64_t columns;
  int64_t depth;
  const T* bias;
  T* out;
  const Activation* activation = nullptr;
  T* hidden = nullptr;

  int64_t sides() const { return activation == nullptr ? 1 : 2; }

  Operand<T> side(int64_t which) const {
    Operand<T> own = right;
    own.data += which * columns * right.line_stride;
    return own;
  }
};

template <typename T>
void store(const Kernels& kernels, int64_t count, const float* from, T* to) {
  if constexpr (std::is_same_v<T, float>) {
    std::copy_n(from, count, to);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    kernels.to_bfloat16(count, from, bits_of(to));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
  }
}

// The block of results whose sums are given, one set a side, lines `stride` apart.
template <typename T>
void write(const Product<T>& product, const Kernels& kernels, float* const* sums, int64_t stride,
           int64_t first_line, int64_t lines, int64_t first_column, int64_t columns) {
  for (int64_t line = 0; line < lines; ++line) {
    for (int64_t side = 0; side < product.sides(); ++side) {
      float* from = sums[side] + line * stride;
      if (product.bias != nullptr) {
        const T* bias = product.bias + side * product.columns + first_column;
        for (int64_t c = 0; c < columns; ++c) from[c] += static_cast<float>(bias[c]);
      }
      if (product.hidden != nullptr) {
        const int64_t at = (2 * (first_line + line) + side) * product.columns + first_column;
        store(kernels, columns, from, product.hidden + at);
      }
    }
    float* from = sums[0] + line * stride;
    if (product.activation != nullptr) {
      activate_row(*product.activation, kernels, columns, from, sums[1] + line * stride, from);
    }
    store(kernels, columns, from,
          product.out + (first_line + line) * product.columns + first_column);
  }
}

// Products whose panels hold units of type U: float, or uint32_t for pairs of bfloat16.
template <typename T, typename U>
void multiply_packed(const std::vector<Product<T>>& products, const Kernels& kernels) {
  constexpr int64_t kPerStep = std::is_same_v<U, float> ? 1 : 2;
  const auto steps_of = [](const Product<T>& p) { return (p.depth + kPerStep - 1) / kPerStep; };
  struct Panels {
    int64_t product;
    int64_t first;
    int64_t count;
  };
  std::vector<Panels> left, right;
  std::vector<int64_t> start;
  int64_t units = 0, scratch = 0;
  for (size_t i = 0; i < products.size(); ++i) {
    const Product<T>& product = products[i];
    const int64_t lines = (product.lines + kernels.rows - 1) / kernels.rows;
    const int64_t columns = (product.columns + kernels.columns - 1) / kernels.columns;
    const int64_t panel = product.sides() * kernels.columns * steps_of(product);
    start.push_back(units);
    units += lines * kernels.rows * steps_of(product);
    for (int64_t p = 0; p < lines; p += kLeftPanels) {
      left.push_back({static_cast<int64_t>(i), p, std::min(kLeftPanels, lines - p)});
    }
    // As many panels as the cache holds are multiplied with each panel on the left while that is in
    // the first-level cache; but no fewer than some tasks for each thread.
    const int64_t fit = std::max<int64_t>(1, kPanelUnits / std::max<int64_t>(1, panel));
    const int64_t even = std::max<int64_t>(1, columns * products.size() / kFewestTasks);
    const int64_t together = std::min(fit, even);
    scratch = std::max(scratch, together * panel);
    for (int64_t p = 0; p < columns; p += together) {
      right.push_back({static_cast<int64_t>(i), p, std::min(together, columns - p)});
    }
  }
  const auto packed_memory = allocate(units);
  U* packed = reinterpret_cast<U*>(packed_memory.get());
  for_each_task(left.size(), [&](int64_t task) {
    const auto [index, first_panel, count] = left[task];
    const Product<T>& product = products[index];
    for (int64_t p = first_panel; p < first_panel + count; ++p) {
      const int64_t first = p * kernels.rows;
      pack(product.left, first, std::min(kernels.rows, product.lines - first), kernels.rows,
           product.depth, packed + start[index] + first * steps_of(product));
    }
  });
  for_each_task(right.size(), [&](int64_t task) {
    const auto [index, first_panel, count] = right[task];
    const Product<T>& product = products[index];
    const int64_t steps = steps_of(product), panel = kernels.columns * steps;
    const int64_t sides = product.sides();
    thread_local std::unique_ptr<uint32_t, Free> memory;
    thread_local int64_t held = 0;
    if (held < scratch) {
      memory = allocate(scratch);
      held = scratch;
    }
    U* panels = reinterpret_cast<U*>(memory.get());
    const auto columns_of = [&](int64_t p) {
      return std::min(kernels.columns, product.columns - (first_panel + p) * kernels.columns);
    };
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t side = 0; side < sides; ++side) {
        pack(product.side(side), (first_panel + p) * kernels.columns, columns_of(p),
             kernels.columns, product.depth, panels + (p * sides + side) * panel);
      }
    }
    for (int64_t first = 0; first < product.lines; first += kernels.rows) {
      const U* lines = packed + start[index] + first * steps;
      for (int64_t p = 0; p < count; ++p) {
        alignas(kAlignment) float tile[2][kMaxTile];
        float* const sums[2] = {tile[0], tile[1]};
        for (int64_t side = 0; side < sides; ++side) {
          const U* columns = panels + (p * sides + side) * panel;
          if constexpr (std::is_same_v<U, float>) {
            kernels.multiply(steps, lines, columns, sums[side]);
          } else {
            kernels.multiply_pairs(steps, lines, columns, sums[side]);
          }
        }
        write(product, kernels, sums, kernels.columns, first,
              std::min(kernels.rows, product.lines - first), (first_panel + p) * kernels.columns,
              columns_of(p));
      }
    }
  });
}

// Copies the lines of products that take them from here and there, so that they follow each other.
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

// Products whose operands both lie along depth, as they are in memory: packing a panel costs as
// much as multiplying it with some ten lines.
template <typename T>
void multiply_unpacked(std::vector<Product<T>> products, const Kernels& kernels) {
  struct Block {
    int64_t product;
    int64_t first_line;
    int64_t first_column;
  };
  const std::vector<T> gathered = gather_lines(products);
  std::vector<Block> blocks;
  for (size_t i = 0; i < products.size(); ++i) {
    for (int64_t c = 0; c < products[i].columns; c += kBlock) {
      for (int64_t line = 0; line < products[i].lines; line += kBlock) {
        blocks.push_back({static_cast<int64_t>(i), line, c});
      }
    }
  }
  for_each_task(blocks.size(), [&](int64_t task) {
    const auto [index, line, column] = blocks[task];
    const Product<T>& product = products[index];
    const int64_t lines = std::min(kBlock, product.lines - line);
    const int64_t columns = std::min(kBlock, product.columns - column);
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

// float64 has no fast path: it serves gradient checks.
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

template <typename T>
void multiply_all(const std::vector<Product<T>>& products) {
  const Kernels& chosen = kernels();
  std::vector<Product<T>> unpacked, packed;
  for (const Product<T>& product : products) {
    const bool as_it_is = !std::is_same_v<T, Half> && needs_no_packing(product);
    (as_it_is ? unpacked : packed).push_back(product);
  }
  if constexpr (!std::is_same_v<T, Half>) {
    if (!unpacked.empty()) multiply_unpacked(std::move(unpacked), chosen);
  }
  if (packed.empty()) return;
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (chosen.multiply_pairs != nullptr) return multiply_packed<T, uint32_t>(packed, chosen);
  }
  multiply_packed<T, float>(packed, chosen);
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
