/* What a CPU can do at most, for limits.py: multiply-adds and reads on one thread a call.
 *
 * All loops over the accumulators are unrolled, so that the compiler keeps them in registers.
 */
#include <stdint.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define UNROLL _Pragma("GCC unroll 32")

#if defined(__AVX512F__)
enum { BYTES = 64, ACCUMULATORS = 24 };
#elif defined(__AVX__)
enum { BYTES = 32, ACCUMULATORS = 12 };
#else
enum { BYTES = 16, ACCUMULATORS = 12 };
#endif
enum { LANES = BYTES / 4, READERS = 8 };
typedef float vector __attribute__((vector_size(BYTES)));
typedef float unaligned __attribute__((vector_size(BYTES), aligned(4)));

/* Returns the floating point operations done; a sum goes to *out. */
double float32_flops(int64_t rounds, float* out) {
  const float seed = *out;
  const vector a = (vector){0} + 1e-6f * seed, b = (vector){0} + seed;
  vector sums[ACCUMULATORS];
  UNROLL for (int i = 0; i < ACCUMULATORS; ++i) sums[i] = a * (float)i;
  for (int64_t round = 0; round < rounds; ++round) {
    UNROLL for (int i = 0; i < ACCUMULATORS; ++i) sums[i] = sums[i] * b + a;
  }
  vector total = sums[0];
  UNROLL for (int i = 1; i < ACCUMULATORS; ++i) total += sums[i];
  *out = total[0];
  return 2.0 * rounds * ACCUMULATORS * LANES;
}

/* The same with bfloat16 factors and float32 sums; 0 where the compiler targets no such thing. */
double bfloat16_flops(int64_t rounds, float* out) {
#ifdef __AVX512BF16__
  const float seed = *out;
  const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  const __m512bh b = (__m512bh)_mm512_set1_epi32(seed > 1 ? 0x3f803f80 : 0);
  __m512 sums[ACCUMULATORS];
  UNROLL for (int i = 0; i < ACCUMULATORS; ++i) sums[i] = _mm512_set1_ps(seed + i);
  for (int64_t round = 0; round < rounds; ++round) {
    UNROLL for (int i = 0; i < ACCUMULATORS; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], a, b);
  }
  __m512 total = sums[0];
  UNROLL for (int i = 1; i < ACCUMULATORS; ++i) total = _mm512_add_ps(total, sums[i]);
  *out = _mm512_reduce_add_ps(total);
  return 64.0 * rounds * ACCUMULATORS;
#else
  (void)rounds, (void)out;
  return 0;
#endif
}

/* Reads count floats, a multiple of 128, and returns the bytes. */
double read_bytes(const float* data, int64_t count, float* out) {
  vector sums[READERS] = {{0}};
  for (int64_t i = 0; i < count; i += READERS * LANES) {
    UNROLL for (int j = 0; j < READERS; ++j) sums[j] += *(const unaligned*)(data + i + j * LANES);
  }
  vector total = sums[0];
  UNROLL for (int j = 1; j < READERS; ++j) total += sums[j];
  *out = total[0];
  return 4.0 * count;
}
