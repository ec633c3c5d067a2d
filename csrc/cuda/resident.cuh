// The number of blocks that can be resident on the device of a tensor.
#pragma once

#include <cuda_runtime.h>

#include "check.h"

namespace unimoe {

inline int device_attribute(const Tensor& on, cudaDeviceAttr attribute) {
  int value = 0;
  const cudaError_t status = cudaDeviceGetAttribute(&value, attribute, on.get_device_index());
  UNIMOE_CHECK(status == cudaSuccess, "no attribute of the GPU: ", cudaGetErrorString(status));
  return value;
}

inline int count_multiprocessors(const Tensor& on) {
  return device_attribute(on, cudaDevAttrMultiProcessorCount);
}

// Blocks per multiprocessor, if limited by shared memory alone.
inline int blocks_by_shared_memory(const Tensor& on, int64_t shared_bytes) {
  const int64_t all = device_attribute(on, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  const int64_t reserved = device_attribute(on, cudaDevAttrReservedSharedMemoryPerBlock);
  const int64_t blocks = all / (shared_bytes + reserved);
  return blocks > 1 ? static_cast<int>(blocks) : 1;
}

}  // namespace unimoe
