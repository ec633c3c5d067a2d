// Description of a product: one expert, its rows, and the output.
#pragma once

#include <algorithm>

#include "activation.h"
#include "kernels.h"
#include "pack.h"
#include "quantized_rows.h"

namespace unimoe {

// One product of an expert, rows of `out` one after the other:
//   out[line of left][line of right] = sum over depth + bias.
// With an activation, `right` and `bias` hold `columns` gates and then as many ups, and
//   out = act(gate) * up,
// and both are written to `hidden`, [lines][2 * columns], unless it is null.
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
  // The right operand as `pack_right` leaves all of its panels, or null.
  const void* panels = nullptr;
  // The right operand in a quantised format, in which case `right` is nothing: its lines are rows,
  // or the columns if it is `transposed`.
  const QuantizedRows* quantized = nullptr;
  bool transposed = false;

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

// The same product for some of the left lines.
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

}  // namespace unimoe
