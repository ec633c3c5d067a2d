// Kernels for AVX2 with FMA: 256-bit vectors, 16 registers.
#include <algorithm>
#include <type_traits>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define UNIMOE_UNROLL _Pragma("GCC unroll 16")

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace unimoe {
namespace {

struct Simd {
  static constexpr int kLanes = 8;
  using Vec = __m256;

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec load(const float* from) { return _mm256_loadu_ps(from); }
  static Vec load(const uint16_t* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Vec load(const int8_t* from) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  }
  static void load_nibbles(const uint8_t* from, Vec& even, Vec& odd) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    const __m256i wide = _mm256_cvtepu8_epi32(bytes), offset = _mm256_set1_epi32(8);
    const __m256i low = _mm256_and_si256(wide, _mm256_set1_epi32(15));
    even = _mm256_cvtepi32_ps(_mm256_sub_epi32(low, offset));
    odd = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(wide, 4), offset));
  }
  static void store_pairs(float* to, Vec even, Vec odd) {
    const Vec low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    _mm256_storeu_ps(to, _mm256_permute2f128_ps(low, high, 0x20));
    _mm256_storeu_ps(to + 8, _mm256_permute2f128_ps(low, high, 0x31));
  }
  static void store(float* to, Vec value) { _mm256_storeu_ps(to, value); }
  static Vec broadcast(const float* from) { return _mm256_broadcast_ss(from); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(Vec value) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static void transpose(Vec (&rows)[8]) {
    Vec quads[8];
    UNIMOE_UNROLL for (int i = 0; i < 8; i += 4) {
      // Of four rows, lane by lane.
      const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(rows[i], rows[i + 1]));
      const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(rows[i], rows[i + 1]));
      const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(rows[i + 2], rows[i + 3]));
      const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(rows[i + 2], rows[i + 3]));
      quads[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23));
      quads[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
      quads[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23));
      quads[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
    }
    UNIMOE_UNROLL for (int i = 0; i < 4; ++i) {
      rows[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
      rows[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
    }
  }
};

#include "kernels.inc"

}  // namespace
}  // namespace unimoe

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace unimoe {

const Kernels* avx2_kernels() {
  static constexpr Kernels table = table_of<6, 2>("avx2");
  return &table;
}

}  // namespace unimoe

#else

namespace unimoe {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace unimoe

#endif
