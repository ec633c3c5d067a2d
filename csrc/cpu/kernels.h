// The inner loops of the CPU operators, one version per instruction set; `kernels()` selects one
// that the CPU supports.
#pragma once

#include <cstdint>
#include <type_traits>

#include "quantized_rows.h"

namespace unimoe {

constexpr int64_t kLineBytes = 64;
// Products of up to this many lines read the right operand from memory without packing it.
constexpr int64_t kFewLines = 8;

// Shape of packed panels. A step of depth is one unit of 32 bits: a float, or two bfloat16. A panel
// of the right operand holds `columns` units for every step. One of the left operand holds `rows`
// units for every step, or, of `block` steps at a time, the units of one row after the other. Depth
// is padded with zeros to a multiple of `block`.
struct Panels {
  int64_t rows;
  int64_t columns;
  int64_t block = 1;
};

// Kernels of one instruction set.
struct Kernels {
  const char* name;
  Panels float_panels;
  Panels pair_panels;
  // sums[rows][columns] = the product of two panels, added to what is there if asked for. Meanwhile
  // memory from `ahead` on is fetched into the cache, one line of it every so many steps, a power
  // of two.
  void (*multiply)(int64_t depth, const float* left, const float* right, bool add, float* sums,
                   const char* ahead, int64_t every);
  // The same for panels of bfloat16, of which the left one has `lines` that are in use; null where
  // no instruction multiplies them.
  void (*multiply_pairs)(int64_t steps, int64_t lines, const uint32_t* left, const uint32_t* right,
                         bool add, float* sums, const char* ahead, int64_t every);
  // What panels are packed with. Lines of 32-bit units become columns of `to`, `width` units wide.
  void (*transpose)(int64_t lines, const char* const* from, int64_t units, int64_t width, char* to);
  // Rows of `count` numbers, `stride` apart, follow each other in `to`, `width` apart.
  void (*copy_rows)(int64_t rows, int64_t count, const float* from, int64_t stride, int64_t width,
                    float* to);
  // The same with the numbers of two rows in each unit, the first row's in the lower half.
  void (*copy_row_pairs)(int64_t pairs, int64_t count, const uint16_t* from, int64_t stride,
                         int64_t width, uint32_t* to);
  // sums[rows][columns] = dot products of the left operand's rows, one after the other, with rows
  // of the right one, `stride` numbers apart.
  void (*dot)(int64_t depth, int64_t rows, const float* left, const float* right, int64_t stride,
              int64_t columns, float* sums);
  void (*dot_bfloat16)(int64_t depth, int64_t rows, const uint16_t* left, const uint16_t* right,
                       int64_t stride, int64_t columns, float* sums);
  // Rounds to nearest even.
  void (*to_bfloat16)(int64_t count, const float* from, uint16_t* to);
  // out = silu(gate) * up over one row.
  void (*silu_mul)(int64_t width, const float* gate, const float* up, float* out);
  void (*silu_mul_bfloat16)(int64_t width, const uint16_t* gate, const uint16_t* up, uint16_t* out);
  // Computes the gradient of score * silu(gate) * up, writes this product to `out` unless it is
  // null, and returns the gradient of the score.
  float (*silu_mul_backward)(int64_t width, float score, const float* grad, const float* gate,
                             const float* up, float* out, float* grad_gate, float* grad_up);
  float (*silu_mul_backward_bfloat16)(int64_t width, float score, const uint16_t* grad,
                                      const uint16_t* gate, const uint16_t* up, uint16_t* out,
                                      uint16_t* grad_gate, uint16_t* grad_up);
  // out = sum over k of weights[k] * rows[k], added in this order. The rows of the next sum are
  // prefetched meanwhile.
  void (*weighted_sum)(int64_t count, const float* const* rows, const float* weights,
                       int64_t next_count, const float* const* next, int64_t width, float* out);
  void (*weighted_sum_bfloat16)(int64_t count, const uint16_t* const* rows, const float* weights,
                                int64_t next_count, const uint16_t* const* next, int64_t width,
                                uint16_t* out);
  // out = e^(x - shift) for x up to shift, 0 if the result is not a normal float32; returns the
  // sum.
  float (*exponentials)(int64_t count, const float* x, float shift, float* out);
  // A line of the left operand as `dot_quantized` reads it, and the sums of its groups, which zero
  // points are multiplied by.
  void (*prepare_line)(const QuantizedRows& rows, const float* from, float* to, float* sums);
  // sums[lines][columns] = dot products of the left operand's lines, one after the other, with
  // quantised rows.
  void (*dot_quantized)(const QuantizedRows& rows, int64_t columns, int64_t lines,
                        const float* left, const float* left_sums, float* sums);
  // The same of four bits with lines of bfloat16 as they are; null where no instruction multiplies
  // pairs of them.
  void (*dot_int4_pairs)(const QuantizedRows& rows, int64_t columns, int64_t lines,
                         const uint16_t* left, const float* left_sums, float* sums);
  // Numbers of one row as floats, from an even one on.
  void (*dequantize)(const QuantizedRows& row, int64_t first, int64_t count, float* to);
  // The same as bfloat16, rounded to nearest even.
  void (*dequantize_bfloat16)(const QuantizedRows& row, int64_t first, int64_t count, uint16_t* to);
};

const Kernels* portable_kernels();
// Null if the binary was compiled for another processor family.
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();
// Whether AMX kernels are compiled, and the CPU has tiles of bfloat16.
bool cpu_has_tiles();
// Null also if the operating system does not let this process use tiles.
const Kernels* amx_kernels();

// Returns the fastest kernels that the CPU supports, or those that UNIMOE_CPU_ISA names:
// "portable", "avx2", "avx512", "avx512_bf16" or "amx". Chosen on the first call. Throws if the CPU
// lacks the named one.
const Kernels& kernels();

// Returns kernels by name, for tests; null if the CPU does not support them.
const Kernels* find_kernels(const char* name);

// Of units of type U: float, or uint32_t for pairs of bfloat16.
template <typename U>
const Panels& panels_of(const Kernels& kernels) {
  if constexpr (std::is_same_v<U, float>) return kernels.float_panels;
  return kernels.pair_panels;
}

inline float to_float(float value) { return value; }

// Of a bfloat16.
inline float to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, sizeof(value));
  return value;
}

// As a bfloat16, rounded to nearest even; a NaN stays one.
inline uint16_t to_bfloat16_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
}

}  // namespace unimoe
