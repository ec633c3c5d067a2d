// Matmul of every expert with its rows, and the gradient of its weight.
//
// The left operand (rows in the forward, columns of the gradient for the weight) is packed once, by
// all threads. A task is one expert and one panel of columns: it packs the panel, which then stays
// in the second-level cache, and multiplies it with all panels on the left. Sums stay in registers
// over the whole depth, so that each result is rounded once and the order of additions is fixed.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <vector>

#include "check.h"
#include "kernels.h"
#include "pack.h"

namespace unimoe {
namespace {

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
std::unique_ptr<uint32_t, Free> allocate(int64_t units) {
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

// One product of an expert: out[line of left][line of right], rows of `out` one after the other.
template <typename T>
struct Product {
  Operand<T> left;
  Operand<T> right;
  int64_t lines;
  int64_t columns;
  int64_t depth;
  const T* bias;
  T* out;
};

template <typename T>
void write(const Product<T>& product, const Kernels& kernels, float* sums, int64_t stride,
           int64_t first_line, int64_t lines, int64_t first_column, int64_t columns) {
  for (int64_t line = 0; line < lines; ++line) {
    float* from = sums + line * stride;
    T* to = product.out + (first_line + line) * product.columns + first_column;
    if (product.bias != nullptr) {
      const T* bias = product.bias + first_column;
      for (int64_t c = 0; c < columns; ++c) from[c] += static_cast<float>(bias[c]);
    }
    if constexpr (std::is_same_v<T, float>) {
      std::copy_n(from, columns, to);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      kernels.to_bfloat16(columns, from, reinterpret_cast<uint16_t*>(to));
    } else {
      for (int64_t c = 0; c < columns; ++c) to[c] = static_cast<T>(from[c]);
    }
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
    const int64_t panel = kernels.columns * steps_of(product);
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
      pack(product.right, (first_panel + p) * kernels.columns, columns_of(p), kernels.columns,
           product.depth, panels + p * panel);
    }
    for (int64_t first = 0; first < product.lines; first += kernels.rows) {
      const U* lines = packed + start[index] + first * steps;
      for (int64_t p = 0; p < count; ++p) {
        alignas(kAlignment) float sums[kMaxTile];
        if constexpr (std::is_same_v<U, float>) {
          kernels.multiply(steps, lines, panels + p * panel, sums);
        } else {
          kernels.multiply_pairs(steps, lines, panels + p * panel, sums);
        }
        write(product, kernels, sums, kernels.columns, first,
              std::min(kernels.rows, product.lines - first), (first_panel + p) * kernels.columns,
              columns_of(p));
      }
    }
  });
}

// Products whose operands both lie along depth, as they are in memory: packing a panel costs as
// much as multiplying it with some ten lines.
template <typename T>
void multiply_unpacked(const std::vector<Product<T>>& products, const Kernels& kernels) {
  struct Block {
    int64_t product;
    int64_t first_line;
    int64_t first_column;
  };
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
    float sums[kBlock * kBlock];
    const T* left = product.left.data + line * product.left.line_stride;
    const T* right = product.right.data + column * product.right.line_stride;
    if constexpr (std::is_same_v<T, float>) {
      kernels.dot(product.depth, lines, left, right, product.right.line_stride, columns, sums);
    } else {
      kernels.dot_bfloat16(product.depth, lines, reinterpret_cast<const uint16_t*>(left),
                           reinterpret_cast<const uint16_t*>(right), product.right.line_stride,
                           columns, sums);
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
void multiply_all(const std::vector<Product<double>>& products) {
  for (const Product<double>& product : products) {
    torch::stable::parallel_for(0, product.lines, 1, [&](int64_t begin, int64_t end) {
      for (int64_t line = begin; line < end; ++line) {
        for (int64_t column = 0; column < product.columns; ++column) {
          const double* left = product.left.data + line * product.left.line_stride;
          const double* right = product.right.data + column * product.right.line_stride;
          double sum = product.bias ? product.bias[column] : 0.0;
          for (int64_t k = 0; k < product.depth; ++k) {
            sum += left[k * product.left.depth_stride] * right[k * product.right.depth_stride];
          }
          product.out[line * product.columns + column] = sum;
        }
      }
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
    if (!unpacked.empty()) multiply_unpacked(unpacked, chosen);
  }
  if (packed.empty()) return;
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (chosen.multiply_pairs != nullptr) return multiply_packed<T, uint32_t>(packed, chosen);
  }
  multiply_packed<T, float>(packed, chosen);
}

void check_grouped_rows(const Tensor& expert_offsets, int64_t experts, int64_t rows) {
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

Tensor grouped_mm(Tensor x, Tensor weight, Tensor expert_offsets, std::optional<Tensor> bias) {
  check_matrix(x, "x");
  UNIMOE_CHECK(weight.dim() == 3 && weight.size(2) == x.size(1), "weight (shape ", shape_of(weight),
               ") must be [E, F, ", x.size(1), "]");
  UNIMOE_CHECK(weight.scalar_type() == x.scalar_type(), "weight must have the dtype of x");
  const int64_t rows = x.size(0), depth = x.size(1), experts = weight.size(0);
  const int64_t width = weight.size(1);
  check_grouped_rows(expert_offsets, experts, rows);
  if (bias) {
    check_matrix(*bias, "bias");
    UNIMOE_CHECK(bias->size(0) == experts && bias->size(1) == width, "bias (shape ",
                 shape_of(*bias), ") must be [", experts, ", ", width, "]");
    UNIMOE_CHECK(bias->scalar_type() == x.scalar_type(), "bias must have the dtype of x");
  }
  Tensor out = empty({rows, width}, x.scalar_type(), x);
  const int32_t* bound = const_data<int32_t>(expert_offsets);
  dispatch_floating(x.scalar_type(), "x", [&](auto element) {
    using T = decltype(element);
    T* to = mutable_data<T>(out);
    std::vector<Product<T>> products;
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t held = bound[e + 1] - bound[e];
      if (held == 0 || width == 0) continue;
      products.push_back(
          {{const_data<T>(x) + bound[e] * depth, depth, 1},
           {const_data<T>(weight) + e * weight.stride(0), weight.stride(1), weight.stride(2)},
           held,
           width,
           depth,
           bias ? const_data<T>(*bias) + e * width : nullptr,
           to + bound[e] * width});
    }
    multiply_all(products);
    const int64_t routed = bound[experts];
    std::fill(to + routed * width, to + rows * width, T(0));
  });
  return out;
}

std::tuple<Tensor, Tensor> grouped_mm_wgrad(Tensor grad, Tensor x, Tensor expert_offsets,
                                            bool has_bias) {
  check_matrix(grad, "grad");
  check_matrix(x, "x");
  const int64_t experts = expert_offsets.size(0) - 1;
  check_grouped_rows(expert_offsets, experts, x.size(0));
  UNIMOE_CHECK(grad.size(0) == x.size(0), "grad (shape ", shape_of(grad), ") must have ", x.size(0),
               " rows");
  UNIMOE_CHECK(grad.scalar_type() == x.scalar_type(), "grad must have the dtype of x");
  const int64_t width = grad.size(1), depth = x.size(1);
  Tensor grad_weight = empty({experts, width, depth}, x.scalar_type(), x);
  Tensor grad_bias = empty({has_bias ? experts : 0, width}, x.scalar_type(), x);
  const int32_t* bound = const_data<int32_t>(expert_offsets);
  dispatch_floating(x.scalar_type(), "x", [&](auto element) {
    using T = decltype(element);
    using Sum = Accumulator<T>;
    T* to = mutable_data<T>(grad_weight);
    std::vector<Product<T>> products;
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t held = bound[e + 1] - bound[e];
      const T* grads = const_data<T>(grad) + bound[e] * width;
      if (has_bias) {
        std::vector<Sum> sums(width, Sum(0));
        for (int64_t row = 0; row < held; ++row) {
          for (int64_t c = 0; c < width; ++c) sums[c] += static_cast<Sum>(grads[row * width + c]);
        }
        T* out = mutable_data<T>(grad_bias) + e * width;
        for (int64_t c = 0; c < width; ++c) out[c] = static_cast<T>(sums[c]);
      }
      if (held == 0) {
        std::fill_n(to + e * width * depth, width * depth, T(0));
      } else if (width != 0 && depth != 0) {
        products.push_back({{grads, 1, width},
                            {const_data<T>(x) + bound[e] * depth, 1, depth},
                            width,
                            depth,
                            held,
                            nullptr,
                            to + e * width * depth});
      }
    }
    multiply_all(products);
  });
  return {grad_weight, grad_bias};
}

}  // namespace
}  // namespace unimoe

STABLE_TORCH_LIBRARY_IMPL(unimoe, CPU, m) {
  m.impl("grouped_mm", TORCH_BOX(&unimoe::grouped_mm));
  m.impl("grouped_mm_wgrad", TORCH_BOX(&unimoe::grouped_mm_wgrad));
}
