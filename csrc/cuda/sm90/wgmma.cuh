// The one instruction that multiplies: 64 rows by 256 columns, 16 deep, both operands in shared
// memory, sums in the registers of a warpgroup.
#pragma once

#include <type_traits>

#include "layout.h"
#include "stable.h"

namespace unimoe::sm90 {

#if UNIMOE_SM90A

constexpr int kSums = 128;

#define UNIMOE_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define UNIMOE_SUMS_16(i) \
  UNIMOE_SUMS_4(i), UNIMOE_SUMS_4(i + 4), UNIMOE_SUMS_4(i + 8), UNIMOE_SUMS_4(i + 12)
#define UNIMOE_SUMS_64(i) \
  UNIMOE_SUMS_16(i), UNIMOE_SUMS_16(i + 16), UNIMOE_SUMS_16(i + 32), UNIMOE_SUMS_16(i + 48)
// clang-format off
#define UNIMOE_SUM_NAMES \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, " \
  "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, " \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, " \
  "%60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, " \
  "%72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
  "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, " \
  "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, " \
  "%120, %121, %122, %123, %124, %125, %126, %127"
// clang-format on
#define UNIMOE_WGMMA(type)                                                               \
  asm volatile(                                                                          \
      "{\n"                                                                              \
      ".reg .pred adds;\n"                                                               \
      "setp.ne.b32 adds, %130, 0;\n"                                                     \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" UNIMOE_SUM_NAMES \
      "}, %128, %129, adds, 1, 1, %131, %132;\n"                                         \
      "}\n"                                                                              \
      : UNIMOE_SUMS_64(0), UNIMOE_SUMS_64(64)                                            \
      : "l"(left), "l"(right), "r"(adds), "n"(kLeftAcross), "n"(kRightAcross))

// d += left * right, or d = left * right where `adds` is 0. An operand across the depth is one
// whose numbers lie side by side along the other dimension.
template <typename T, int kLeftAcross, int kRightAcross>
__device__ __forceinline__ void multiply(float (&d)[kSums], uint64_t left, uint64_t right,
                                         int adds) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    UNIMOE_WGMMA("bf16");
  } else {
    static_assert(std::is_same_v<T, Half>);
    UNIMOE_WGMMA("f16");
  }
}

#undef UNIMOE_WGMMA
#undef UNIMOE_SUM_NAMES
#undef UNIMOE_SUMS_64
#undef UNIMOE_SUMS_16
#undef UNIMOE_SUMS_4

// Before the first of a series of products, after registers or shared memory were written.
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Ends a series of products, and waits until no more than `kPending` series are under way.
template <int kPending>
__device__ __forceinline__ void end_products() {
  asm volatile(
      "wgmma.commit_group.sync.aligned;\n"
      "wgmma.wait_group.sync.aligned %0;" ::"n"(kPending)
      : "memory");
}

__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

#endif

}  // namespace unimoe::sm90
