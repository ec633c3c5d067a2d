// The only place where a kernel is launched: on the device of its tensors and on torch's current
// stream there, so that kernels keep their order under streams, graphs and torch.compile.
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

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
};

// Does nothing for an empty grid, which CUDA would refuse.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), LaunchShape shape, const Tensor& on,
            Arguments... arguments) {
  if (shape.grid.x == 0 || shape.grid.y == 0) return;
  const auto device = on.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  kernel<<<shape.grid, shape.block, shape.shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      static_cast<Parameters>(arguments)...);
  const cudaError_t status = cudaGetLastError();
  UNIMOE_CHECK(status == cudaSuccess, "CUDA kernel launch failed: ", cudaGetErrorString(status));
}

}  // namespace unimoe
