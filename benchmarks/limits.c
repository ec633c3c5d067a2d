/* What a CPU can do at most, for limits.py: multiply-adds and reads on one thread a call.
 *
 * All loops over the accumulators are unrolled, so that the compiler keeps them in registers.
 */
#include <stdint.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#define HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>
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

#ifdef HAS_TILES
/* Products of tiles of 16 x 32 bfloat16, four sums; 0 where Linux does not let this process use
 * them. */
static double tile_flops(int64_t rounds, float* out) {
  const long request_permission = 0x1023, tile_data = 18;
  if (syscall(SYS_arch_prctl, request_permission, tile_data) != 0) return 0;
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } __attribute__((aligned(64))) shapes = {1, 0, {0}, {0}, {0}};
  for (int i = 0; i < 8; ++i) shapes.bytes[i] = 64, shapes.rows[i] = 16;
  float numbers[16 * 16];
  for (int i = 0; i < 256; ++i) numbers[i] = *out;
  __asm__ volatile("" : : "r"(&shapes), "r"(numbers) : "memory");
  _tile_loadconfig(&shapes);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, numbers, 64);
  _tile_loadd(5, numbers, 64);
  _tile_loadd(6, numbers, 64);
  _tile_loadd(7, numbers, 64);
  for (int64_t round = 0; round < rounds; ++round) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, numbers, 64);
  _tile_release();
  *out = numbers[0];
  return 2.0 * rounds * 4 * 16 * 16 * 32;
}
#endif

/* The same with bfloat16 factors and float32 sums; 0 where the compiler targets no such thing. */
double bfloat16_flops(int64_t rounds, float* out) {
#ifdef HAS_TILES
  const double done = tile_flops(rounds / 16, out);
  if (done > 0) return done;
#endif
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
