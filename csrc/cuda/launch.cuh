// Launches all kernels on the device of their tensors and on torch's current stream, so that order
// is preserved under streams, graphs and torch.compile.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "check.h"

namespace unimoe {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

template <typename Integer>
constexpr Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

// What every block may have of shared memory, and what the smallest GPU from sm_80 on grants to a
// kernel that asks for it. Kernels of one architecture may ask for more.
constexpr int64_t kSharedBytes = 48 * 1024;
constexpr int64_t kMostSharedBytes = 99 * 1024;
// Of both, what is left for the variables of fixed size that a kernel declares.
constexpr int64_t kFixedSharedBytes = 1024;

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
};

// Returns without a launch for an empty grid, which CUDA would reject.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), LaunchShape shape, const Tensor& on,
            Arguments... arguments) {
  if (shape.grid.x == 0 || shape.grid.y == 0) return;
  const auto device = on.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  if (shape.shared_bytes > kSharedBytes - kFixedSharedBytes) {
    const cudaError_t granted = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
    UNIMOE_CHECK(granted == cudaSuccess, "no shared memory of ", shape.shared_bytes,
                 " bytes: ", cudaGetErrorString(granted));
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  kernel<<<shape.grid, shape.block, shape.shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      static_cast<Parameters>(arguments)...);
  const cudaError_t status = cudaGetLastError();
  UNIMOE_CHECK(status == cudaSuccess, "CUDA kernel launch failed: ", cudaGetErrorString(status));
}

}  // namespace unimoe
