// Kernels for AVX-512: 512-bit vectors, 32 registers; with AVX512-BF16 also products of bfloat16.
#include <algorithm>
#include <type_traits>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define UNIMOE_UNROLL _Pragma("GCC unroll 16")

#if !defined(__clang__)
// gcc 12 warns about undefined lanes in its own intrinsics.
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
  static Vec load(const int8_t* from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
  }
  static void load_nibbles(const uint8_t* from, Vec& even, Vec& odd) {
    // A table looks at the low four bits alone.
    const Vec table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m512i wide = _mm512_cvtepu8_epi32(bytes);
    even = _mm512_permutexvar_ps(wide, table);
    odd = _mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), table);
  }
  static void store_pairs(float* to, Vec even, Vec odd) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    _mm512_storeu_ps(to, _mm512_permutex2var_ps(even, first, odd));
    _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(even, second, odd));
  }
  static void store(float* to, Vec value) { _mm512_storeu_ps(to, value); }
  static Vec broadcast(const float* from) { return _mm512_set1_ps(*from); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(Vec value) { return _mm512_reduce_add_ps(value); }
  static void transpose(Vec (&rows)[16]) {
    Vec quads[16];
    UNIMOE_UNROLL for (int i = 0; i < 16; i += 4) {
      // Of four rows, lane by lane.
      const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(rows[i], rows[i + 1]));
      const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(rows[i], rows[i + 1]));
      const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(rows[i + 2], rows[i + 3]));
      const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(rows[i + 2], rows[i + 3]));
      quads[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
      quads[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
      quads[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
      quads[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
    }
    UNIMOE_UNROLL for (int i = 0; i < 4; ++i) {
      const Vec low01 = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0x44);
      const Vec high01 = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0xee);
      const Vec low23 = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0x44);
      const Vec high23 = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0xee);
      rows[i] = _mm512_shuffle_f32x4(low01, low23, 0x88);
      rows[i + 4] = _mm512_shuffle_f32x4(low01, low23, 0xdd);
      rows[i + 8] = _mm512_shuffle_f32x4(high01, high23, 0x88);
      rows[i + 12] = _mm512_shuffle_f32x4(high01, high23, 0xdd);
    }
  }
};

#include "kernels.inc"

template <>
struct Sums<4, 4> {
  static void store(const __m512 (&vectors)[4][4], float (&sums)[4][4]) {
    // Halves are added, then their halves, until lane `row`, number `c` is the sum of one vector.
    __m512 columns[4];
    UNIMOE_UNROLL for (int c = 0; c < 4; ++c) {
      const __m512 rows01 = added<0x44, 0xee>(vectors[0][c], vectors[1][c]);
      const __m512 rows23 = added<0x44, 0xee>(vectors[2][c], vectors[3][c]);
      columns[c] = added<0x88, 0xdd>(rows01, rows23);
    }
    const __m512 columns01 = added_pairs(columns[0], columns[1]);
    const __m512 columns23 = added_pairs(columns[2], columns[3]);
    const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(columns01, columns23, 0x88),
                                     _mm512_shuffle_ps(columns01, columns23, 0xdd));
    _mm512_storeu_ps(&sums[0][0], all);
  }

  // Two choices of lanes, added.
  template <int kFirst, int kSecond>
  static __m512 added(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, kFirst), _mm512_shuffle_f32x4(a, b, kSecond));
  }

  // The first two numbers of each lane and the last two, added.
  static __m512 added_pairs(__m512 a, __m512 b) {
    const __m512d first = _mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
    const __m512d second = _mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
    return _mm512_add_ps(_mm512_castpd_ps(first), _mm512_castpd_ps(second));
  }
};

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

// Four bits with bfloat16: integers from -8 to 7 are bfloat16 without rounding.
struct PairedInt4 {
  using Left = uint16_t;
  static constexpr int64_t kStep = 32;

  static void fetch(const uint8_t* values, int64_t k) { Int4Numbers::fetch(values, k); }

  // The integers less 8, in the order of the row.
  static __m512bh load(const uint8_t* from) {
    // bfloat16 of -8 to 7, twice: the table looks at five bits, of which the highest is none of
    // this number's.
    const __m256i once =
        _mm256_setr_epi16(-0x3f00, -0x3f20, -0x3f40, -0x3f60, -0x3f80, -0x3fc0, -0x4000, -0x4080, 0,
                          0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0);
    const __m512i table = _mm512_inserti64x4(_mm512_castsi256_si512(once), once, 1);
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m512i wide = _mm512_cvtepu8_epi32(bytes);
    const __m512i indices = _mm512_or_si512(wide, _mm512_slli_epi32(wide, 12));
    return (__m512bh)_mm512_permutexvar_epi16(indices, table);
  }

  template <int kLines>
  static void add(const uint8_t* values, const uint16_t* left, int64_t depth, int64_t k,
                  __m512* part) {
    const __m512bh weight = load(values + k / 2);
    UNIMOE_UNROLL for (int line = 0; line < kLines; ++line) {
      const __m512bh x = (__m512bh)_mm512_loadu_si512(left + line * depth + k);
      part[line] = _mm512_dpbf16_ps(part[line], weight, x);
    }
  }
};

// `dequantize_bfloat16` by the instruction that rounds. Panels of columns begin and end within
// groups: halves of 16 numbers keep them off the scalar loop.
void dequantize_rounded(const QuantizedRows& row, int64_t first, int64_t count, uint16_t* to) {
  for (int64_t k = first; k < first + count;) {
    const int64_t group = k / row.group;
    const int64_t until = std::min(first + count, (group + 1) * row.group);
    const float scale = row.narrow_scales
                            ? unimoe::to_float(static_cast<const uint16_t*>(row.scales)[group])
                            : static_cast<const float*>(row.scales)[group];
    const float shift = zero_shift(row, group);
    const __m512 factor = _mm512_set1_ps(scale), more = _mm512_set1_ps(shift);
    const auto pairs = [&](__m128i bytes) __attribute__((always_inline)) {
      uint8_t numbers[16];
      _mm_storeu_si128(reinterpret_cast<__m128i*>(numbers), bytes);
      __m512 even, odd;
      Simd::load_nibbles(numbers, even, odd);
      const __m256i low = (__m256i)_mm512_cvtneps_pbh((even + more) * factor);
      const __m256i high = (__m256i)_mm512_cvtneps_pbh((odd + more) * factor);
      return _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                             _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
    };
    if (row.four_bits) {
      for (; k + 32 <= until; k += 32, to += 32) {
        const auto* from = reinterpret_cast<const __m128i*>(row.values + k / 2);
        _mm512_storeu_si512(to, pairs(_mm_loadu_si128(from)));
      }
      for (; k + 16 <= until; k += 16, to += 16) {
        const auto* from = reinterpret_cast<const __m128i*>(row.values + k / 2);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                            _mm512_castsi512_si256(pairs(_mm_loadl_epi64(from))));
      }
    } else {
      const auto* values = reinterpret_cast<const int8_t*>(row.values);
      for (; k + 32 <= until; k += 32, to += 32) {
        const __m512 low = Simd::load(values + k) * factor;
        const __m512 high = Simd::load(values + k + 16) * factor;
        _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
      }
      for (; k + 16 <= until; k += 16, to += 16) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                            (__m256i)_mm512_cvtneps_pbh(Simd::load(values + k) * factor));
      }
    }
    for (; k < until; ++k) *to++ = to_bfloat16_bits((number_at(row, k) + shift) * scale);
  }
}

template <int kRows, int kVectors>
void multiply_pairs(int64_t steps, int64_t, const uint32_t* left, const uint32_t* right, bool add,
                    float* sums, const char* ahead, int64_t every) {
  __m512 total[kRows][kVectors];
  UNIMOE_UNROLL for (int row = 0; row < kRows; ++row) {
    UNIMOE_UNROLL for (int v = 0; v < kVectors; ++v) total[row][v] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < steps; ++k) {
    fetch_ahead(ahead, every, k);
    __builtin_prefetch(left + kRows * kStepsAhead);
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
  store_tile(total, add, sums);
}

constexpr Kernels bfloat16_table() {
  Kernels table = table_of<8, 3>("avx512_bf16");
  table.multiply_pairs = multiply_pairs<8, 3>;
  table.dot_bfloat16 = dot_pairs;
  table.dot_int4_pairs = dot_numbers<PairedInt4>;
  table.dequantize_bfloat16 = dequantize_rounded;
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
