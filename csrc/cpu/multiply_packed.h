// Products of many lines: both operands are packed into panels.
//
// The left operand (rows in the forward, columns of the gradient for weight gradients) is packed in
// waves of bounded size, each while the previous one is multiplied. A task is one expert and some
// panels of columns: it packs these panels, which then remain in the L2 cache, and multiplies them
// by all left panels. Sums are kept in registers over a few hundred steps of depth and in a float32
// tile over all steps, so that each result is rounded once and the order of additions is fixed.
#pragma once

#include <algorithm>
#include <atomic>
#include <deque>
#include <vector>

#include "ahead.h"
#include "kernels.h"
#include "pack.h"
#include "pack_quantized.h"
#include "product.h"
#include "tasks.h"

namespace unimoe {

// Left panels that one task packs; their lines share cache lines if depth is strided.
constexpr int64_t kLeftPanels = 8;
// In units of 32 bits: half of an L2 cache of 1 MiB.
constexpr int64_t kPanelUnits = 128 * 1024;
constexpr int64_t kFewestTasks = 16;
// Sums of this many steps are computed separately and then added, because rounding errors grow with
// the number of sequential additions.
constexpr int64_t kStepsAtOnce = 512;
// Beyond this many steps, several left panels are multiplied by one part of the right panels before
// the next part. Otherwise few right panels would fit into the L2 cache, and the left panels would
// be read from memory for each of them.
constexpr int64_t kLongSteps = 4096;
constexpr int64_t kLinesTogether = 16;
// Of the packed left operand: small enough for an L3 cache, but with enough lines to amortise
// packing the right operand again.
constexpr int64_t kPackedUnits = 1024 * 1024;
constexpr int64_t kFewestLines = 2048;
// Buffers larger than this are freed after a call.
constexpr int64_t kKeptUnits = 4 * 1024 * 1024;

constexpr int64_t kBuffers = 3;

inline int64_t parts_of(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// Units of type U that hold so many numbers.
template <typename U>
int64_t units_of(int64_t numbers) {
  return parts_of(numbers, std::is_same_v<U, float> ? 1 : 2);
}

// Steps of the panels that hold units of type U.
template <typename U>
int64_t steps_of(const Kernels& kernels, int64_t depth) {
  const int64_t block = panels_of<U>(kernels).block;
  return parts_of(units_of<U>(depth), block) * block;
}

// Packs some lines of a product's left operand into a panel.
template <typename T, typename U>
void pack_left(const Kernels& kernels, const Product<T>& product, int64_t first, U* to) {
  const Panels& panels = panels_of<U>(kernels);
  const int64_t held = std::min(panels.rows, product.lines - first);
  if constexpr (std::is_same_v<T, BFloat16> && std::is_same_v<U, uint32_t>) {
    if (panels.block > 1) {
      return pack_blocks(kernels, product.left, first, held, product.depth, to);
    }
  }
  pack(kernels, product.left, first, held, panels.rows, product.depth, to);
}

// Packs some panels of a product's right operand, the sides of each one after the other.
template <typename T, typename U>
void pack_right(const Kernels& kernels, const Product<T>& product, int64_t first, int64_t count,
                U* to) {
  const int64_t width = panels_of<U>(kernels).columns;
  const int64_t panel = width * steps_of<U>(kernels, product.depth);
  const int64_t used = width * units_of<U>(product.depth);
  for (int64_t p = first; p < first + count; ++p) {
    const int64_t column = p * width;
    const int64_t held = std::min(width, product.columns - column);
    for (int64_t side = 0; side < product.sides(); ++side) {
      if (product.quantized != nullptr) {
        pack_quantized(kernels, *product.quantized, product.transposed,
                       side * product.columns + column, held, product.depth, to);
      } else {
        pack(kernels, product.side(side), column, held, width, product.depth, to);
      }
      std::fill(to + used, to + panel, U(0));
      to += panel;
    }
  }
}

// The products of one call, and the tasks into which they are divided.
template <typename T, typename U>
class PackedMatmul {
 public:
  PackedMatmul(const std::vector<Product<T>>& given, const Kernels& kernels)
      : kernels_(kernels), shape_(panels_of<U>(kernels)) {
    split_lines(given);
    plan();
  }

  void run() {
    thread_local Scratch workspace;
    const int64_t buffers = std::min<int64_t>(waves_.size(), kBuffers);
    packed_ = reinterpret_cast<U*>(workspace.at_least(buffers * buffer_));
    const int64_t tasks = tasks_.size();
    for_each_task_and_next(tasks, [&](int64_t number, int64_t next) {
      if (failed_) return;
      try {
        const Task& task = tasks_[number];
        task.packs ? pack_left(task) : multiply(task, next < tasks ? &tasks_[next] : nullptr);
      } catch (...) {
        failed_ = true;
        throw;
      }
    });
    workspace.shrink_to(kKeptUnits);
  }

 private:
  // Panels of a product to pack on the left, or to pack on the right and multiply.
  struct Task {
    int64_t wave;
    int64_t product;
    int64_t first;
    int64_t count;
    bool packs;
  };

  // Products whose left operands are packed together. The buffers are shared by all waves: one is
  // multiplied while the next is packed.
  struct Wave {
    int64_t units = 0;
    std::vector<Task> packing;
    std::vector<Task> multiplying;
    std::atomic<int64_t> to_pack{0};
    std::atomic<int64_t> to_multiply{0};
  };

  int64_t steps_of(const Product<T>& product) const {
    return unimoe::steps_of<U>(kernels_, product.depth);
  }

  int64_t tile() const { return shape_.rows * shape_.columns; }

  int64_t lines_together(const Product<T>& product) const {
    return steps_of(product) > kLongSteps ? kLinesTogether : 1;
  }

  // Cuts products with more lines than a wave holds.
  void split_lines(const std::vector<Product<T>>& given) {
    for (const Product<T>& product : given) {
      const int64_t most =
          std::max(kFewestLines, kPackedUnits / std::max<int64_t>(1, steps_of(product)));
      const int64_t parts = parts_of(product.lines, most);
      const int64_t even = parts_of(parts_of(product.lines, parts), shape_.rows) * shape_.rows;
      for (int64_t first = 0; first < product.lines; first += even) {
        products_.push_back(some_lines(product, first, std::min(even, product.lines - first)));
      }
    }
  }

  void plan() {
    int64_t all_columns = 0;
    for (const Product<T>& p : products_) all_columns += parts_of(p.columns, shape_.columns);
    const int64_t even = std::max<int64_t>(1, all_columns / kFewestTasks);
    for (int64_t i = 0; i < static_cast<int64_t>(products_.size()); ++i) {
      const int64_t units =
          parts_of(products_[i].lines, shape_.rows) * shape_.rows * steps_of(products_[i]);
      if (waves_.empty() || waves_.back().units + units > kPackedUnits) waves_.emplace_back();
      start_.push_back(waves_.back().units);
      waves_.back().units += units;
      buffer_ = std::max(buffer_, waves_.back().units);
      plan_product(i, even);
    }
    buffer_ = parts_of(buffer_, kAlignment / 4) * (kAlignment / 4);
    // A wave is packed before the previous one is multiplied.
    const std::vector<Task>* ahead = nullptr;
    for (Wave& wave : waves_) {
      wave.to_pack = wave.packing.size();
      wave.to_multiply = wave.multiplying.size();
      tasks_.insert(tasks_.end(), wave.packing.begin(), wave.packing.end());
      if (ahead != nullptr) tasks_.insert(tasks_.end(), ahead->begin(), ahead->end());
      ahead = &wave.multiplying;
    }
    if (ahead != nullptr) tasks_.insert(tasks_.end(), ahead->begin(), ahead->end());
  }

  // The tasks of one product, on the right of at most `even` panels.
  void plan_product(int64_t index, int64_t even) {
    const Product<T>& product = products_[index];
    const int64_t wave = waves_.size() - 1, steps = steps_of(product);
    const int64_t lines = parts_of(product.lines, shape_.rows);
    for (int64_t p = 0; p < lines; p += kLeftPanels) {
      const int64_t count = std::min(kLeftPanels, lines - p);
      waves_.back().packing.push_back({wave, index, p, count, true});
    }
    // As many panels, or parts of long ones, as the cache holds are multiplied with the same lines;
    // but there are no fewer than some tasks for each thread.
    const int64_t width = product.sides() * shape_.columns;
    const int64_t part = width * (lines_together(product) == 1 ? steps : kStepsAtOnce);
    const int64_t fit = std::max<int64_t>(1, kPanelUnits / std::max<int64_t>(1, part));
    const int64_t together = std::min(fit, even);
    const int64_t tiles = product.sides() * lines_together(product) * tile();
    scratch_ = std::max(scratch_, together * (width * steps + tiles));
    const int64_t columns = parts_of(product.columns, shape_.columns);
    for (int64_t p = 0; p < columns; p += together) {
      const int64_t count = std::min(together, columns - p);
      waves_.back().multiplying.push_back({wave, index, p, count, false});
    }
  }

  U* left_of(const Task& task) const {
    return packed_ + task.wave % kBuffers * buffer_ + start_[task.product];
  }

  void pack_left(const Task& task) {
    const Product<T>& product = products_[task.product];
    if (task.wave >= kBuffers) wait_for(waves_[task.wave - kBuffers].to_multiply, failed_);
    for (int64_t p = task.first; p < task.first + task.count; ++p) {
      const int64_t first = p * shape_.rows;
      unimoe::pack_left(kernels_, product, first, left_of(task) + first * steps_of(product));
    }
    --waves_[task.wave].to_pack;
  }

  // What `next` will pack, if its lines follow each other in memory.
  Ahead ahead_of(const Task* next, int64_t steps) const {
    if (next == nullptr || next->packs) return {};
    const Product<T>& product = products_[next->product];
    const Operand<T>& right = product.right;
    const int64_t panel = product.sides() * shape_.columns * steps_of(product);
    if (product.panels != nullptr) {
      const U* panels = static_cast<const U*>(product.panels) + next->first * panel;
      return {panels, panels, next->count * panel * static_cast<int64_t>(sizeof(U)), steps};
    }
    if (product.quantized != nullptr) return ahead_of_quantized(product, *next, steps);
    if (right.depth_stride != 1 || right.line_stride != product.depth) return {};
    const int64_t first = next->first * shape_.columns;
    const int64_t lines = std::min(next->count * shape_.columns, product.columns - first);
    return {right.line(first), product.side(product.sides() - 1).line(first),
            lines * product.depth * static_cast<int64_t>(sizeof(T)), steps};
  }

  Ahead ahead_of_quantized(const Product<T>& product, const Task& next, int64_t steps) const {
    if (product.transposed) return {};
    const int64_t first = next.first * shape_.columns;
    const int64_t lines = std::min(next.count * shape_.columns, product.columns - first);
    const QuantizedRows own = product.quantized->from(first);
    const QuantizedRows other = own.from((product.sides() - 1) * product.columns);
    return {own.values, other.values, lines * own.row_bytes(), steps};
  }

  void multiply(const Task& task, const Task* next) {
    const Product<T>& product = products_[task.product];
    const int64_t steps = steps_of(product), sides = product.sides();
    const int64_t panel = shape_.columns * steps;
    thread_local Scratch memory;
    U* const scratch = reinterpret_cast<U*>(memory.at_least(scratch_));
    float* const tiles = reinterpret_cast<float*>(scratch + task.count * sides * panel);
    const U* panels = scratch;
    if (product.panels != nullptr) {
      panels = static_cast<const U*>(product.panels) + task.first * sides * panel;
    } else {
      pack_right(kernels_, product, task.first, task.count, scratch);
    }
    wait_for(waves_[task.wave].to_pack, failed_);
    Ahead ahead = ahead_of(next, parts_of(product.lines, shape_.rows) * task.count * sides * steps);
    const int64_t together = lines_together(product);
    const int64_t at_once = together == 1 ? 1 : task.count;
    for (int64_t first = 0; first < product.lines; first += together * shape_.rows) {
      const int64_t held = std::min(together, parts_of(product.lines - first, shape_.rows));
      for (int64_t p = 0; p < task.count; p += at_once) {
        multiply_tiles(product, first, left_of(task) + first * steps, held,
                       panels + p * sides * panel, at_once, tiles, ahead);
        write_tiles(product, tiles, first, held, (task.first + p) * shape_.columns, at_once);
      }
    }
    --waves_[task.wave].to_multiply;
  }

  // tiles[panel on the right][side][panel on the left] = their products.
  void multiply_tiles(const Product<T>& product, int64_t first_line, const U* left, int64_t lefts,
                      const U* right, int64_t rights, float* tiles, Ahead& ahead) const {
    const int64_t steps = steps_of(product);
    for (int64_t k = 0; k == 0 || k < steps; k += kStepsAtOnce) {
      const int64_t depth = std::min(kStepsAtOnce, steps - k);
      float* sums = tiles;
      for (int64_t p = 0; p < rights * product.sides(); ++p) {
        const U* columns = right + (p * steps + k) * shape_.columns;
        for (int64_t i = 0; i < lefts; ++i, sums += tile()) {
          const U* lines = left + (i * steps + k) * shape_.rows;
          const auto [from, every] = ahead.take(depth);
          if constexpr (std::is_same_v<U, float>) {
            kernels_.multiply(depth, lines, columns, k != 0, sums, from, every);
          } else {
            const int64_t used = product.lines - first_line - i * shape_.rows;
            kernels_.multiply_pairs(depth, std::min(shape_.rows, used), lines, columns, k != 0,
                                    sums, from, every);
          }
        }
      }
    }
  }

  void write_tiles(const Product<T>& product, float* tiles, int64_t first_line, int64_t lefts,
                   int64_t first_column, int64_t rights) const {
    for (int64_t p = 0; p < rights; ++p) {
      float* const own = tiles + p * product.sides() * lefts * tile();
      const int64_t column = first_column + p * shape_.columns;
      for (int64_t i = 0; i < lefts; ++i) {
        const int64_t line = first_line + i * shape_.rows;
        float* const sums[2] = {own + i * tile(),
                                own + ((product.sides() - 1) * lefts + i) * tile()};
        write(product, kernels_, sums, shape_.columns, line,
              std::min(shape_.rows, product.lines - line), column,
              std::min(shape_.columns, product.columns - column));
      }
    }
  }

  const Kernels& kernels_;
  const Panels shape_;
  std::vector<Product<T>> products_;
  // Where each product's packed lines start in its buffer.
  std::vector<int64_t> start_;
  std::deque<Wave> waves_;
  std::vector<Task> tasks_;
  // Units of a buffer, and of what a thread packs on the right with its tiles.
  int64_t buffer_ = 0;
  int64_t scratch_ = 0;
  U* packed_ = nullptr;
  std::atomic<bool> failed_{false};
};

}  // namespace unimoe
