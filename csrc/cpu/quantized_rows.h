// Rows of a weight in a quantised format, as kernels read them.
#pragma once

#include <cstdint>

namespace unimoe {

// Number i of a row is scale[i / group] * (integer - zero[i / group]).
struct QuantizedRows {
  // Two integers from 0 to 15 in a byte, the first one in its low four bits; else one int8.
  bool four_bits;
  // Scales are bfloat16, else float32.
  bool narrow_scales;
  // Numbers of a row, and how many of them share a scale.
  int64_t depth;
  int64_t group;
  const uint8_t* values;
  const void* scales;
  // Null where all are 8 (four bits) or 0.
  const uint8_t* zeros;

  int64_t row_bytes() const { return four_bits ? depth / 2 : depth; }
  int64_t groups() const { return depth / group; }

  QuantizedRows from(int64_t row) const {
    QuantizedRows rest = *this;
    const int64_t scale = row * groups();
    rest.values += row * row_bytes();
    rest.scales = static_cast<const char*>(scales) + scale * (narrow_scales ? 2 : 4);
    if (zeros != nullptr) rest.zeros += scale;
    return rest;
  }
};

}  // namespace unimoe
