// Encodes tensor maps with the driver's function, which is looked up at run time: the extension
// does not link against the driver.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>

#include "sm90/tensor_map.h"

namespace unimoe::sm90 {
namespace {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) &&
              alignof(TensorMap) >= alignof(CUtensorMap));

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  constexpr unsigned kFirstCuda = 12000;
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t status = cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &function, kFirstCuda, cudaEnableDefault, &found);
  UNIMOE_CHECK(status == cudaSuccess && found == cudaDriverEntryPointSuccess && function,
               "the CUDA driver has no cuTensorMapEncodeTiled: ", cudaGetErrorString(status));
  return reinterpret_cast<Encode>(function);
}

}  // namespace

TensorMap encode_tensor_map(const TensorLayout& layout) {
  static const Encode call = find_encode();
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult status =
      call(&map, layout.half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
           static_cast<cuuint32_t>(layout.rank), const_cast<void*>(layout.data),
           layout.sizes.data(), layout.strides.data(), layout.box.data(), steps,
           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
           CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  UNIMOE_CHECK(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled refused a tensor of ",
               layout.sizes[0], " columns and ", layout.sizes[1], " rows: error ",
               static_cast<int>(status));
  TensorMap copy;
  std::memcpy(&copy, &map, sizeof(copy));
  return copy;
}

}  // namespace unimoe::sm90
