// Encodes tensor maps with the driver's function, which is looked up at run time: the extension
// does not link against the driver.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>
#include <mutex>
#include <unordered_map>

#include "sm90/tensor_map.h"
#include "sm90/tile_schedule.h"

namespace unimoe::sm90 {
namespace {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) &&
              alignof(TensorMap) >= alignof(CUtensorMap));

// A model has some hundred weights, each with a map or two, and activations of a few sizes.
constexpr size_t kMostMaps = 4096;

struct Hash {
  size_t operator()(const TensorLayout& layout) const {
    uint64_t hash = reinterpret_cast<uintptr_t>(layout.data);
    const auto mix = [&](uint64_t value) {
      hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 29;
    };
    mix(static_cast<uint64_t>(layout.rank) << 33 | static_cast<uint64_t>(layout.device) << 1 |
        static_cast<uint64_t>(layout.half));
    for (const uint64_t size : layout.sizes) mix(size);
    for (const uint64_t stride : layout.strides) mix(stride);
    for (const uint32_t size : layout.box) mix(size);
    return static_cast<size_t>(hash);
  }
};

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

TensorMap encode(const TensorLayout& layout) {
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

}  // namespace

TensorMap tensor_map(const TensorLayout& layout) {
  static std::mutex mutex;
  static std::unordered_map<TensorLayout, TensorMap, Hash> maps;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = maps.find(layout);
  if (found != maps.end()) return found->second;
  const TensorMap map = encode(layout);
  if (maps.size() >= kMostMaps) maps.clear();
  maps.emplace(layout, map);
  return map;
}

}  // namespace unimoe::sm90
