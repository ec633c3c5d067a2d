// Packs panels of a quantised weight: some steps of depth are read back to floats, which stay in
// the cache, and packed as any others.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "pack.h"
#include "product.h"

namespace unimoe {

constexpr int64_t kQuantizedSteps = 256;

// Packs `held` lines from line `first` on: rows of the weight, or its columns if it is transposed.
// U is the unit of a panel, float or a pair of bfloat16.
template <typename U>
void pack_quantized(const Kernels& kernels, const QuantizedRows& weight, bool transposed,
                    int64_t first, int64_t held, int64_t depth, U* to) {
  using T = std::conditional_t<std::is_same_v<U, float>, float, BFloat16>;
  constexpr int64_t kNumbers = sizeof(U) / sizeof(T);
  const int64_t width = panels_of<U>(kernels).columns;
  alignas(64) thread_local T lines[kMaxWidth * kQuantizedSteps];
  const auto read = [&](int64_t row, int64_t from, int64_t count, T* into) {
    if constexpr (std::is_same_v<T, float>) {
      kernels.dequantize(weight.from(row), from, count, into);
    } else {
      kernels.dequantize_bfloat16(weight.from(row), from, count, bits_of(into));
    }
  };
  for (int64_t k = 0; k < depth; k += kQuantizedSteps) {
    const int64_t steps = std::min(kQuantizedSteps, depth - k);
    if (transposed) {
      for (int64_t i = 0; i < steps; ++i) read(k + i, first, held, lines + i * kMaxWidth);
    } else {
      for (int64_t i = 0; i < held; ++i) read(first + i, k, steps, lines + i * kQuantizedSteps);
    }
    const Operand<T> some{lines, transposed ? 1 : kQuantizedSteps, transposed ? kMaxWidth : 1};
    pack(kernels, some, 0, held, width, steps, to + k / kNumbers * width);
  }
}

}  // namespace unimoe
