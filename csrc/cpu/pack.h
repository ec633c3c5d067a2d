// Packs operands of a matmul into panels: `width` lines side by side, one step of depth after the
// other. A step is one float, or two bfloat16 that follow each other in depth.
#pragma once

#include <algorithm>
#include <cstring>

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

// Four rows of 32-bit units become columns of `to`.
inline void transpose_four(const char* const* rows, int64_t steps, int64_t width, char* to) {
  typedef uint32_t Four __attribute__((vector_size(16)));
#if defined(__clang__)
#define UNIMOE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
  typedef int32_t Mask __attribute__((vector_size(16)));
#define UNIMOE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Mask{__VA_ARGS__})
#endif
  int64_t step = 0;
  for (; step + 4 <= steps; step += 4) {
    Four row[4];
    for (int i = 0; i < 4; ++i) std::memcpy(&row[i], rows[i] + 4 * step, 16);
    const Four low01 = UNIMOE_SHUFFLE(row[0], row[1], 0, 4, 1, 5);
    const Four high01 = UNIMOE_SHUFFLE(row[0], row[1], 2, 6, 3, 7);
    const Four low23 = UNIMOE_SHUFFLE(row[2], row[3], 0, 4, 1, 5);
    const Four high23 = UNIMOE_SHUFFLE(row[2], row[3], 2, 6, 3, 7);
    const Four column[4] = {
        UNIMOE_SHUFFLE(low01, low23, 0, 1, 4, 5), UNIMOE_SHUFFLE(low01, low23, 2, 3, 6, 7),
        UNIMOE_SHUFFLE(high01, high23, 0, 1, 4, 5), UNIMOE_SHUFFLE(high01, high23, 2, 3, 6, 7)};
    for (int i = 0; i < 4; ++i) std::memcpy(to + 4 * (step + i) * width, &column[i], 16);
  }
  for (; step < steps; ++step) {
    for (int i = 0; i < 4; ++i) {
      std::memcpy(to + 4 * (step * width + i), rows[i] + 4 * step, 4);
    }
  }
#undef UNIMOE_SHUFFLE
}

// Lines whose 32-bit units lie one after the other along depth.
template <typename T>
void transpose(const Operand<T>& from, int64_t first, int64_t held, int64_t steps, int64_t width,
               void* to) {
  char* out = static_cast<char*>(to);
  const auto line_at = [&](int64_t line) {
    return reinterpret_cast<const char*>(from.line(first + line));
  };
  int64_t line = 0;
  for (; line + 4 <= held; line += 4) {
    const char* const rows[4] = {line_at(line), line_at(line + 1), line_at(line + 2),
                                 line_at(line + 3)};
    transpose_four(rows, steps, width, out + 4 * line);
  }
  for (; line < held; ++line) {
    const char* row = line_at(line);
    for (int64_t step = 0; step < steps; ++step) {
      std::memcpy(out + 4 * (step * width + line), row + 4 * step, 4);
    }
  }
}

// Packs `held` lines from line `first` on; the other lines of the panel are zeros.
template <typename T>
void pack(const Operand<T>& from, int64_t first, int64_t held, int64_t width, int64_t depth,
          float* to) {
  if (held < width) std::fill_n(to, depth * width, 0.0f);
  if (from.depth_stride == 1 && std::is_same_v<T, float>) {
    return transpose(from, first, held, depth, width, to);
  }
  if (from.index != nullptr) {
    for (int64_t line = 0; line < held; ++line) {
      const T* own = from.line(first + line);
      for (int64_t k = 0; k < depth; ++k) {
        to[k * width + line] = static_cast<float>(own[k * from.depth_stride]);
      }
    }
    return;
  }
  for (int64_t k = 0; k < depth; ++k) {
    const T* step = from.line(first) + k * from.depth_stride;
    float* row = to + k * width;
    if (from.line_stride == 1) {
      for (int64_t line = 0; line < held; ++line) row[line] = static_cast<float>(step[line]);
    } else {
      for (int64_t line = 0; line < held; ++line) {
        row[line] = static_cast<float>(step[line * from.line_stride]);
      }
    }
  }
}

// Rows of bfloat16 side by side: the upper one goes into the upper half of each unit.
inline void interleave(const BFloat16* lower, const BFloat16* upper, int64_t stride, int64_t count,
                       uint32_t* to) {
  const auto unit = [&](int64_t at) {
    return static_cast<uint32_t>(lower[at].x) | static_cast<uint32_t>(upper[at].x) << 16;
  };
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = unit(i);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = unit(i * stride);
  }
}

// The same in pairs of bfloat16; an odd last step is paired with zero. An index needs a depth
// stride of 1.
inline void pack(const Operand<BFloat16>& from, int64_t first, int64_t held, int64_t width,
                 int64_t depth, uint32_t* to) {
  const int64_t steps = (depth + 1) / 2, whole = depth / 2;
  if (held < width || steps > whole) std::fill_n(to, steps * width, 0u);
  if (from.depth_stride == 1) {
    transpose(from, first, held, whole, width, to);
  } else {
    for (int64_t step = 0; step < whole; ++step) {
      const BFloat16* lower = from.line(first) + 2 * step * from.depth_stride;
      interleave(lower, lower + from.depth_stride, from.line_stride, held, to + step * width);
    }
  }
  for (int64_t line = 0; steps > whole && line < held; ++line) {
    to[whole * width + line] = from.line(first + line)[(depth - 1) * from.depth_stride].x;
  }
}

}  // namespace unimoe
