// Packs operands of a matmul into panels: `width` lines side by side, step by step along depth. A
// step is one float, or two bfloat16 that are adjacent along depth. Panels of the left operand may
// hold blocks of steps instead, line by line.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "stable.h"

namespace unimoe {

// Numbers in memory. A line is a row or a column of the result, depth is what is summed over.
// With an index, line i is number index[i] / divisor of those in memory.
template <typename T>
struct Operand {
  const T* data;
  int64_t line_stride;
  int64_t depth_stride;
  const int32_t* index = nullptr;
  int64_t divisor = 1;

  const T* line(int64_t i) const {
    return data + (index == nullptr ? i : index[i] / divisor) * line_stride;
  }
};

// Maximum number of lines of a panel.
constexpr int64_t kMaxWidth = 48;

// Lines whose 32-bit units are contiguous along depth.
template <typename T>
void pack_lines(const Kernels& kernels, const Operand<T>& from, int64_t first, int64_t held,
                int64_t units, int64_t width, void* to) {
  const char* lines[kMaxWidth];
  for (int64_t line = 0; line < held; ++line) {
    lines[line] = reinterpret_cast<const char*>(from.line(first + line));
  }
  kernels.transpose(held, lines, units, width, static_cast<char*>(to));
}

// Packs `held` lines from line `first` on; the other lines of the panel are zeros.
template <typename T>
void pack(const Kernels& kernels, const Operand<T>& from, int64_t first, int64_t held,
          int64_t width, int64_t depth, float* to) {
  if (held < width) std::fill_n(to, depth * width, 0.0f);
  if constexpr (std::is_same_v<T, float>) {
    if (from.depth_stride == 1) {
      return pack_lines(kernels, from, first, held, depth, width, to);
    }
    if (from.line_stride == 1 && from.index == nullptr) {
      return kernels.copy_rows(depth, held, from.line(first), from.depth_stride, width, to);
    }
  }
  const auto copy = [&](int64_t line, int64_t k) {
    to[k * width + line] = static_cast<float>(from.line(first + line)[k * from.depth_stride]);
  };
  if (from.line_stride == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t line = 0; line < held; ++line) copy(line, k);
    }
  } else {
    for (int64_t line = 0; line < held; ++line) {
      for (int64_t k = 0; k < depth; ++k) copy(line, k);
    }
  }
}

// The same in pairs of bfloat16; an odd last step is paired with zero.
inline void pack(const Kernels& kernels, const Operand<BFloat16>& from, int64_t first, int64_t held,
                 int64_t width, int64_t depth, uint32_t* to) {
  const int64_t steps = (depth + 1) / 2, whole = depth / 2;
  if (held < width || steps > whole) std::fill_n(to, steps * width, 0u);
  const auto bits_at = [&](int64_t line, int64_t k) {
    return static_cast<uint32_t>(from.line(first + line)[k * from.depth_stride].x);
  };
  if (from.depth_stride == 1) {
    pack_lines(kernels, from, first, held, whole, width, to);
  } else if (from.line_stride == 1 && from.index == nullptr) {
    kernels.copy_row_pairs(whole, held, bits_of(from.line(first)), from.depth_stride, width, to);
  } else {
    for (int64_t line = 0; line < held; ++line) {
      for (int64_t step = 0; step < whole; ++step) {
        to[step * width + line] = bits_at(line, 2 * step) | bits_at(line, 2 * step + 1) << 16;
      }
    }
  }
  for (int64_t line = 0; steps > whole && line < held; ++line) {
    to[whole * width + line] = bits_at(line, depth - 1);
  }
}

// Packs `held` lines of the left operand from line `first` on, of which each block of steps follows
// the last one; unused lines are left as they are.
inline void pack_blocks(const Kernels& kernels, const Operand<BFloat16>& from, int64_t first,
                        int64_t held, int64_t depth, uint32_t* to) {
  const int64_t rows = kernels.pair_panels.rows, block = kernels.pair_panels.block;
  const int64_t numbers = 2 * block;
  if (from.depth_stride == 1) {
    for (int64_t line = 0; line < held; ++line) {
      const uint16_t* own = bits_of(from.line(first + line));
      uint32_t* into = to + line * block;
      int64_t k = 0;
      for (; k + numbers <= depth; k += numbers, into += rows * block) {
        std::copy_n(own + k, numbers, reinterpret_cast<uint16_t*>(into));
      }
      if (k == depth) continue;
      std::fill_n(into, block, 0u);
      std::copy(own + k, own + depth, reinterpret_cast<uint16_t*>(into));
    }
    return;
  }
  constexpr int64_t kMaxBlock = 16;
  uint32_t steps[kMaxBlock * kMaxWidth];
  const char* lines[kMaxBlock];
  for (int64_t i = 0; i < block; ++i) lines[i] = reinterpret_cast<const char*>(steps + i * rows);
  for (int64_t k = 0; k < depth; k += numbers, to += rows * block) {
    Operand<BFloat16> some = from;
    some.data += k * from.depth_stride;
    if (k + numbers > depth) std::fill_n(steps, block * rows, 0u);
    pack(kernels, some, first, held, rows, std::min(numbers, depth - k), steps);
    kernels.transpose(block, lines, rows, block, reinterpret_cast<char*>(to));
  }
}

}  // namespace unimoe
