// Aliases of the LibTorch stable ABI, and a few functions that it does not have. All uses of torch
// in csrc go through this header, so that one binary runs on TORCH_TARGET_VERSION and later.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <type_traits>

namespace unimoe {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The accumulation dtype: float64 for float64 inputs, else float32.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A contiguous uninitialised tensor on the device of `like`. The C call costs a fraction of
// torch::stable::empty, which boxes six arguments and goes through the dispatcher.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  int64_t strides[4];
  int64_t stride = 1;
  for (int64_t i = static_cast<int64_t>(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = stride;
    const int64_t size = sizes.begin()[i];
    stride *= size > 1 ? size : 1;
  }
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                  strides, dtype_code, device_type,
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}

// data_ptr<T>() of the stable ABI does not support all names of BFloat16 and Half; callers have
// already dispatched on the dtype.
template <typename T>
const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline uint16_t* bits_of(BFloat16* data) { return reinterpret_cast<uint16_t*>(data); }
inline const uint16_t* bits_of(const BFloat16* data) {
  return reinterpret_cast<const uint16_t*>(data);
}

// Calls `body` with a value of the C++ type of `dtype`, one of the four floating types.
template <typename Body>
void dispatch_floating(ScalarType dtype, const char* name, Body&& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    case ScalarType::Half:
      return body(Half{});
    default:
      throw std::runtime_error(std::string(name) +
                               " must be float32, float64, bfloat16 or float16");
  }
}

// The same for the two 16-bit dtypes that tensor cores support.
template <typename Body>
void dispatch_16_bit(ScalarType dtype, Body&& body) {
  if (dtype == ScalarType::BFloat16) return body(BFloat16{});
  if (dtype == ScalarType::Half) return body(Half{});
  throw std::runtime_error("the dtype must be bfloat16 or float16");
}

}  // namespace unimoe
