// Kernels for AVX-512: 512-bit vectors, 32 registers; with AVX512-BF16 also products of bfloat16.
#include <algorithm>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define UNIMOE_UNROLL _Pragma("GCC unroll 16")

#if !defined(__clang__)
// gcc 12 takes the undefined lanes in its own intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16")
#endif

namespace unimoe {
namespace {

struct Simd {
  static constexpr int kLanes = 16;
  using Vec = __m512;

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec load(const float* from) { return _mm512_loadu_ps(from); }
  static Vec load(const uint16_t* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static void store(float* to, Vec value) { _mm512_storeu_ps(to, value); }
  static Vec broadcast(const float* from) { return _mm512_set1_ps(*from); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(Vec value) { return _mm512_reduce_add_ps(value); }
};

#include "kernels.inc"

// What follows uses AVX512-BF16 instructions.
struct PairedBfloat16 {
  uint16_t bits;
};

inline float to_float(PairedBfloat16 value) { return unimoe::to_float(value.bits); }

template <>
struct Dot<PairedBfloat16> {
  using Part = __m512bh;
  static constexpr int kStep = 32;
  static Part load(const PairedBfloat16* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static __m512 add(__m512 total, Part a, Part b) { return _mm512_dpbf16_ps(total, a, b); }
};

void dot_pairs(int64_t depth, int64_t rows, const uint16_t* left, const uint16_t* right,
               int64_t stride, int64_t columns, float* sums) {
  dot(depth, rows, reinterpret_cast<const PairedBfloat16*>(left),
      reinterpret_cast<const PairedBfloat16*>(right), stride, columns, sums);
}

template <int kRows, int kVectors>
void multiply_pairs(int64_t steps, const uint32_t* left, const uint32_t* right, float* sums) {
  __m512 total[kRows][kVectors];
  UNIMOE_UNROLL for (int row = 0; row < kRows; ++row) {
    UNIMOE_UNROLL for (int v = 0; v < kVectors; ++v) total[row][v] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < steps; ++k) {
    __m512bh column[kVectors];
    UNIMOE_UNROLL for (int v = 0; v < kVectors; ++v) {
      column[v] = (__m512bh)_mm512_loadu_si512(right + v * 16);
    }
    UNIMOE_UNROLL for (int row = 0; row < kRows; ++row) {
      const __m512bh factor = (__m512bh)_mm512_set1_epi32(static_cast<int>(left[row]));
      UNIMOE_UNROLL for (int v = 0; v < kVectors; ++v) {
        total[row][v] = _mm512_dpbf16_ps(total[row][v], factor, column[v]);
      }
    }
    left += kRows;
    right += kVectors * 16;
  }
  UNIMOE_UNROLL for (int row = 0; row < kRows; ++row) {
    UNIMOE_UNROLL for (int v = 0; v < kVectors; ++v) {
      _mm512_storeu_ps(sums + (row * kVectors + v) * 16, total[row][v]);
    }
  }
}

constexpr Kernels bfloat16_table() {
  Kernels table = table_of<8, 3>("avx512_bf16");
  table.multiply_pairs = multiply_pairs<8, 3>;
  table.dot_bfloat16 = dot_pairs;
  return table;
}

}  // namespace
}  // namespace unimoe

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace unimoe {

const Kernels* avx512_kernels() {
  static constexpr Kernels table = table_of<8, 3>("avx512");
  return &table;
}

const Kernels* avx512_bf16_kernels() {
  static constexpr Kernels table = bfloat16_table();
  return &table;
}

}  // namespace unimoe

#else

namespace unimoe {
const Kernels* avx512_kernels() { return nullptr; }
const Kernels* avx512_bf16_kernels() { return nullptr; }
}  // namespace unimoe

#endif
