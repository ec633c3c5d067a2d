// Stands in for csrc/cuda/tensor_map_encode.cu on a CPU, where there is no driver: maps that no
// kernel can read. Kernels for compute capability 9.0 are not emulated; the emulated launcher
// refuses their shared memory.
#include "sm90/tensor_map.h"

namespace unimoe::sm90 {

TensorMap encode_tensor_map(const TensorLayout&) { return {}; }

}  // namespace unimoe::sm90
