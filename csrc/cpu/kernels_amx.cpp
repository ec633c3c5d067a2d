// Kernels for AMX: products of bfloat16 in tiles of 16 rows of 64 bytes, everything else as with
// AVX512-BF16.
#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,amx-tile,amx-bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,amx-tile,amx-bf16")
#endif

namespace unimoe {
namespace {

// Rows of a tile, and numbers of 32 bits in each.
constexpr int64_t kTile = 16;
// Two tiles a side: four loads for four products.
constexpr Panels kPanels{2 * kTile, 2 * kTile, kTile};

// Operand of the instruction that configures tiles.
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 are sums, 4 and 5 rows of the left operand, 6 and 7 steps of the right one.
TileShapes shapes_of(int64_t lines) {
  TileShapes shapes;
  const auto upper = static_cast<uint8_t>(std::min(lines, kTile));
  const auto lower = static_cast<uint8_t>(std::max(lines - kTile, int64_t{1}));
  const uint8_t rows[8] = {upper, upper, lower, lower, upper, lower, kTile, kTile};
  for (int i = 0; i < 8; ++i) {
    shapes.bytes[i] = 4 * kTile;
    shapes.rows[i] = rows[i];
  }
  return shapes;
}

// Fetches what the steps of one block have to, see `Kernels::multiply`.
void fetch_block(const char*& ahead, int64_t every, int64_t k) {
  if ((k & (every - 1)) != 0) return;
  for (int64_t step = 0; step < kTile; step += every) {
    __builtin_prefetch(ahead, 0, 2);
    ahead += kLineBytes;
  }
}

void add_tiles(int64_t lines, const float* tiles, float* sums) {
  for (int64_t i = 0; i < lines * kPanels.columns; i += kTile) {
    _mm512_storeu_ps(sums + i, _mm512_add_ps(_mm512_loadu_ps(sums + i), _mm512_load_ps(tiles + i)));
  }
}

void multiply_tiles(int64_t steps, int64_t lines, const uint32_t* left, const uint32_t* right,
                    bool add, float* sums, const char* ahead, int64_t every) {
  const TileShapes shapes = shapes_of(lines);
  // gcc takes the intrinsic to read the first eight bytes alone.
  __asm__ volatile("" : : "r"(&shapes) : "memory");
  _tile_loadconfig(&shapes);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const bool two = lines > kTile;
  for (int64_t k = 0; k < steps; k += kTile) {
    fetch_block(ahead, every, k);
    _tile_loadd(6, right, 4 * kPanels.columns);
    _tile_loadd(4, left, 4 * kTile);
    _tile_loadd(7, right + kTile, 4 * kPanels.columns);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (two) {
      _tile_loadd(5, left + kTile * kTile, 4 * kTile);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    left += kPanels.rows * kTile;
    right += kPanels.columns * kTile;
  }
  alignas(64) float own[kPanels.rows * kPanels.columns];
  float* const to = add ? own : sums;
  constexpr int64_t kStride = 4 * kPanels.columns;
  _tile_stored(0, to, kStride);
  _tile_stored(1, to + kTile, kStride);
  if (two) {
    _tile_stored(2, to + kTile * kPanels.columns, kStride);
    _tile_stored(3, to + kTile * kPanels.columns + kTile, kStride);
  }
  _tile_release();
  if (add) add_tiles(lines, own, sums);
}

// Linux gives the registers of tiles to processes that ask for them.
bool may_use_tiles() {
  if (!cpu_has_tiles()) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Kernels tile_table() {
  Kernels table = *avx512_bf16_kernels();
  table.name = "amx";
  table.pair_panels = kPanels;
  table.multiply_pairs = multiply_tiles;
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

bool cpu_has_tiles() {
  unsigned int eax, ebx, ecx, edx;
  constexpr unsigned int kBfloat16 = 1u << 22, kTile = 1u << 24;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kBfloat16) && (edx & kTile);
}

const Kernels* amx_kernels() {
  static const bool usable = may_use_tiles();
  static const Kernels table = tile_table();
  return usable ? &table : nullptr;
}

}  // namespace unimoe

#else

namespace unimoe {
bool cpu_has_tiles() { return false; }
const Kernels* amx_kernels() { return nullptr; }
}  // namespace unimoe

#endif
