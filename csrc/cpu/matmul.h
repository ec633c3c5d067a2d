// Matmuls of experts with their rows.
//
// The left operand (rows in the forward, columns of the gradient for the weight) is packed in waves
// of bounded size, each while the one before it is multiplied. A task is one expert and some panels
// of columns: it packs the panels, which then stay in the second-level cache, and multiplies them
// with all panels on the left. Sums stay in registers over some hundred steps of depth and in a
// float32 tile over all of them, so that each result is rounded once and the order of additions is
// fixed.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "activation.h"
#include "check.h"
#include "kernels.h"
#include "pack.h"

namespace unimoe {

constexpr int64_t kMaxTile = 8 * kMaxWidth;
constexpr int64_t kBlock = 64;
constexpr int64_t kFewLines = 64;
constexpr int64_t kFewColumns = 24;
constexpr int64_t kAlignment = 64;
// Panels on the left that one task packs: their lines share cache lines where depth is strided.
constexpr int64_t kLeftPanels = 8;
// Of 32 bits; half of a second-level cache of 1 MiB.
constexpr int64_t kPanelUnits = 128 * 1024;
constexpr int64_t kFewestTasks = 16;
// Sums of so many steps are added up by themselves before they join the others: rounding grows with
// the number of additions one after the other.
constexpr int64_t kStepsAtOnce = 512;
// Beyond so many steps several panels on the left are multiplied with parts of those on the right
// before the next part: else few panels on the right would fit into the second-level cache, and
// those on the left would be read from memory for each of them.
constexpr int64_t kLongSteps = 4096;
constexpr int64_t kLinesTogether = 16;
// Of the packed left operand: what stays in a third-level cache, but lines enough to make up for
// packing the right one again.
constexpr int64_t kPackedUnits = 1024 * 1024;
constexpr int64_t kFewestLines = 2048;
// More than this is handed back after a call.
constexpr int64_t kKeptUnits = 4 * 1024 * 1024;

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

// Memory that is kept for the next call, and grows.
class Scratch {
 public:
  uint32_t* at_least(int64_t units) {
    if (held_ < units) {
      memory_.reset();
      held_ = 0;
      memory_ = allocate(units);
      held_ = units;
    }
    return memory_.get();
  }

  void shrink_to(int64_t units) {
    if (held_ > units) {
      memory_.reset();
      held_ = 0;
    }
  }

 private:
  std::unique_ptr<uint32_t, Free> memory_;
  int64_t held_ = 0;
};

// Waits until a number that other threads count down is zero, or one of them has failed.
inline void wait_for(const std::atomic<int64_t>& number, const std::atomic<bool>& failed) {
  while (number.load(std::memory_order_acquire) != 0 && !failed) std::this_thread::yield();
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

// The same product of some of the lines on the left.
template <typename T>
Product<T> some_lines(const Product<T>& product, int64_t first, int64_t lines) {
  Product<T> some = product;
  if (some.left.index != nullptr) {
    some.left.index += first;
  } else {
    some.left.data += first * some.left.line_stride;
  }
  some.lines = lines;
  some.out += first * some.columns;
  if (some.hidden != nullptr) some.hidden += first * 2 * some.columns;
  return some;
}

// Products whose left operands are packed together, and the tasks that are left to do. Three of
// them share the memory of packed operands: one is multiplied while the next is packed.
struct Wave {
  int64_t units = 0;
  std::atomic<int64_t> to_pack{0};
  std::atomic<int64_t> to_multiply{0};
};
constexpr int64_t kBuffers = 3;

// Products whose panels hold units of type U: float, or uint32_t for pairs of bfloat16.
template <typename T, typename U>
void multiply_packed(const std::vector<Product<T>>& given, const Kernels& kernels) {
  constexpr int64_t kPerStep = std::is_same_v<U, float> ? 1 : 2;
  const auto steps_of = [](const Product<T>& p) { return (p.depth + kPerStep - 1) / kPerStep; };
  const auto lines_together = [&](const Product<T>& p) {
    return steps_of(p) > kLongSteps ? kLinesTogether : 1;
  };
  const auto panels_of = [](int64_t lines, int64_t width) { return (lines + width - 1) / width; };
  std::vector<Product<T>> products;
  int64_t all_columns = 0;
  for (const Product<T>& product : given) {
    const int64_t most =
        std::max(kFewestLines, kPackedUnits / std::max<int64_t>(1, steps_of(product)));
    const int64_t parts = panels_of(product.lines, most);
    const int64_t even = panels_of(panels_of(product.lines, parts), kernels.rows) * kernels.rows;
    for (int64_t first = 0; first < product.lines; first += even) {
      products.push_back(some_lines(product, first, std::min(even, product.lines - first)));
      all_columns += panels_of(product.columns, kernels.columns);
    }
  }

  // Panels that a task packs on the left, or packs on the right and multiplies.
  struct Task {
    int64_t wave;
    int64_t product;
    int64_t first;
    int64_t count;
    bool packs;
  };
  std::vector<std::vector<Task>> packing, multiplying;
  std::vector<int64_t> start(products.size());
  std::vector<int64_t> units;
  int64_t scratch = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(products.size()); ++i) {
    const Product<T>& product = products[i];
    const int64_t lines = panels_of(product.lines, kernels.rows);
    const int64_t columns = panels_of(product.columns, kernels.columns);
    const int64_t panel = product.sides() * kernels.columns * steps_of(product);
    const int64_t own = lines * kernels.rows * steps_of(product);
    if (units.empty() || units.back() + own > kPackedUnits) {
      units.push_back(0);
      packing.emplace_back();
      multiplying.emplace_back();
    }
    const int64_t wave = units.size() - 1;
    start[i] = units.back();
    units.back() += own;
    for (int64_t p = 0; p < lines; p += kLeftPanels) {
      packing.back().push_back({wave, i, p, std::min(kLeftPanels, lines - p), true});
    }
    // As many panels, or parts of long ones, as the cache holds are multiplied with the same lines;
    // but there are no fewer than some tasks for each thread.
    const int64_t part = lines_together(product) == 1 ? steps_of(product) : kStepsAtOnce;
    const int64_t units_at_once = product.sides() * kernels.columns * part;
    const int64_t fit = std::max<int64_t>(1, kPanelUnits / std::max<int64_t>(1, units_at_once));
    const int64_t even = std::max<int64_t>(1, all_columns / kFewestTasks);
    const int64_t together = std::min(fit, even);
    const int64_t tiles = product.sides() * lines_together(product) * kMaxTile;
    scratch = std::max(scratch, together * (panel + tiles));
    for (int64_t p = 0; p < columns; p += together) {
      multiplying.back().push_back({wave, i, p, std::min(together, columns - p), false});
    }
  }
  const int64_t waves = units.size();
  std::vector<Wave> state(waves);
  std::vector<Task> tasks;
  int64_t buffer = 0;
  for (int64_t wave = 0; wave < waves + 1; ++wave) {
    // A wave is packed before the one ahead of it is multiplied.
    if (wave < waves) {
      buffer = std::max(buffer, units[wave]);
      state[wave].to_pack = packing[wave].size();
      state[wave].to_multiply = multiplying[wave].size();
      tasks.insert(tasks.end(), packing[wave].begin(), packing[wave].end());
    }
    if (wave > 0) {
      tasks.insert(tasks.end(), multiplying[wave - 1].begin(), multiplying[wave - 1].end());
    }
  }
  buffer = (buffer + kAlignment / 4 - 1) / (kAlignment / 4) * (kAlignment / 4);
  thread_local Scratch workspace;
  U* packed = reinterpret_cast<U*>(workspace.at_least(std::min(waves, kBuffers) * buffer));

  std::atomic<bool> failed{false};
  const auto run = [&](const Task& task) {
    const Product<T>& product = products[task.product];
    const int64_t steps = steps_of(product);
    U* const left = packed + task.wave % kBuffers * buffer + start[task.product];
    if (task.packs) {
      if (task.wave >= kBuffers) wait_for(state[task.wave - kBuffers].to_multiply, failed);
      for (int64_t p = task.first; p < task.first + task.count; ++p) {
        const int64_t first = p * kernels.rows;
        pack(kernels, product.left, first, std::min(kernels.rows, product.lines - first),
             kernels.rows, product.depth, left + first * steps);
      }
      --state[task.wave].to_pack;
      return;
    }
    const int64_t panel = kernels.columns * steps, sides = product.sides();
    thread_local Scratch memory;
    U* panels = reinterpret_cast<U*>(memory.at_least(scratch));
    const auto columns_of = [&](int64_t p) {
      return std::min(kernels.columns, product.columns - (task.first + p) * kernels.columns);
    };
    for (int64_t p = 0; p < task.count; ++p) {
      for (int64_t side = 0; side < sides; ++side) {
        pack(kernels, product.side(side), (task.first + p) * kernels.columns, columns_of(p),
             kernels.columns, product.depth, panels + (p * sides + side) * panel);
      }
    }
    wait_for(state[task.wave].to_pack, failed);
    float* const tiles = reinterpret_cast<float*>(panels + task.count * sides * panel);
    const int64_t together = lines_together(product);
    const int64_t at_once = together == 1 ? 1 : task.count;
    for (int64_t first = 0; first < product.lines; first += together * kernels.rows) {
      const int64_t held = std::min(together, panels_of(product.lines - first, kernels.rows));
      for (int64_t some = 0; some < task.count; some += at_once) {
        const auto tile = [&](int64_t p, int64_t side, int64_t i) {
          return tiles + (((p - some) * sides + side) * together + i) * kMaxTile;
        };
        for (int64_t k = 0; k == 0 || k < steps; k += kStepsAtOnce) {
          const int64_t depth = std::min(kStepsAtOnce, steps - k);
          for (int64_t p = some; p < some + at_once; ++p) {
            for (int64_t side = 0; side < sides; ++side) {
              const U* columns = panels + (p * sides + side) * panel + k * kernels.columns;
              for (int64_t i = 0; i < held; ++i) {
                const U* lines = left + (first + i * kernels.rows) * steps + k * kernels.rows;
                if constexpr (std::is_same_v<U, float>) {
                  kernels.multiply(depth, lines, columns, k != 0, tile(p, side, i));
                } else {
                  kernels.multiply_pairs(depth, lines, columns, k != 0, tile(p, side, i));
                }
              }
            }
          }
        }
        for (int64_t p = some; p < some + at_once; ++p) {
          for (int64_t i = 0; i < held; ++i) {
            const int64_t line = first + i * kernels.rows;
            float* const sums[2] = {tile(p, 0, i), tile(p, sides - 1, i)};
            write(product, kernels, sums, kernels.columns, line,
                  std::min(kernels.rows, product.lines - line), (task.first + p) * kernels.columns,
                  columns_of(p));
          }
        }
      }
    }
    --state[task.wave].to_multiply;
  };
  for_each_task(tasks.size(), [&](int64_t number) {
    if (failed) return;
    try {
      run(tasks[number]);
    } catch (...) {
      failed = true;
      throw;
    }
  });
  workspace.shrink_to(kKeptUnits);
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
