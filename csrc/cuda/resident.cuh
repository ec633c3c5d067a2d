// How many blocks the device of a tensor can hold at once.
#pragma once

#include <cuda_runtime.h>

#include "check.h"

namespace unimoe {

struct Resident {
  int multiprocessors;
  int blocks;  // on each, of the shared memory in question
};

// For blocks whose number on a multiprocessor is bound by shared memory alone.
inline Resident resident_blocks(const Tensor& on, int64_t shared_bytes) {
  const int device = on.get_device_index();
  int multiprocessors = 0, shared = 0, reserved = 0;
  for (const auto& [value, attribute] :
       {std::pair{&multiprocessors, cudaDevAttrMultiProcessorCount},
        std::pair{&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
        std::pair{&reserved, cudaDevAttrReservedSharedMemoryPerBlock}}) {
    const cudaError_t status = cudaDeviceGetAttribute(value, attribute, device);
    UNIMOE_CHECK(status == cudaSuccess, "no attribute of the GPU: ", cudaGetErrorString(status));
  }
  const int64_t blocks = shared / (shared_bytes + reserved);
  return {multiprocessors, blocks > 1 ? static_cast<int>(blocks) : 1};
}

}  // namespace unimoe
