// Kernels for any processor, vectorised by the compiler as far as possible.
#include <algorithm>
#include <type_traits>

#include "kernels.h"

#define UNIMOE_UNROLL _Pragma("GCC unroll 16")

namespace unimoe {
namespace {

struct Simd {
  static constexpr int kLanes = 4;
  typedef float Vec __attribute__((vector_size(16)));

  static Vec zero() { return Vec{}; }
  static Vec load(const float* from) {
    Vec value;
    __builtin_memcpy(&value, from, sizeof(value));
    return value;
  }
  static Vec load(const uint16_t* from) {
    return Vec{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])};
  }
  static Vec load(const int8_t* from) {
    return Vec{static_cast<float>(from[0]), static_cast<float>(from[1]),
               static_cast<float>(from[2]), static_cast<float>(from[3])};
  }
  static void load_nibbles(const uint8_t* from, Vec& even, Vec& odd) {
    for (int i = 0; i < kLanes; ++i) {
      even[i] = static_cast<float>((from[i] & 15) - 8);
      odd[i] = static_cast<float>((from[i] >> 4) - 8);
    }
  }
  static void store_pairs(float* to, Vec even, Vec odd) {
    for (int i = 0; i < kLanes; ++i) {
      to[2 * i] = even[i];
      to[2 * i + 1] = odd[i];
    }
  }
  static void store(float* to, Vec value) { __builtin_memcpy(to, &value, sizeof(value)); }
  static Vec broadcast(const float* from) { return Vec{*from, *from, *from, *from}; }
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  static float sum(Vec value) { return (value[0] + value[1]) + (value[2] + value[3]); }
};

#include "kernels.inc"

}  // namespace

const Kernels* portable_kernels() {
  static constexpr Kernels table = table_of<4, 2>("portable");
  return &table;
}

}  // namespace unimoe
