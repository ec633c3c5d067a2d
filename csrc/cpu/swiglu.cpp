// Gated activations of rows that hold gate and up side by side.
#include "activation.h"

namespace unimoe {
namespace {

Tensor swiglu(Tensor gate_up, std::string activation, double limit, double alpha) {
  check_matrix(gate_up, "gate_up");
  check_floating(gate_up, "gate_up");
  const Activation chosen = activation_of(activation, limit, alpha);
  const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  UNIMOE_CHECK(gate_up.size(1) == 2 * width, "gate_up (shape ", shape_of(gate_up),
               ") must have an even last size");
  Tensor out = empty({rows, width}, gate_up.scalar_type(), gate_up);
  const Kernels& fast = kernels();
  dispatch_floating(gate_up.scalar_type(), "gate_up", [&](auto element) {
    using T = decltype(element);
    const T* from = const_data<T>(gate_up);
    T* to = mutable_data<T>(out);
    torch::stable::parallel_for(
        0, rows, activated_rows_per_task(width), [&](int64_t begin, int64_t end) {
          for (int64_t row = begin; row < end; ++row) {
            const T* gate = from + row * 2 * width;
            activate_row(chosen, fast, width, gate, gate + width, to + row * width);
          }
        });
  });
  return out;
}

Tensor swiglu_backward(Tensor grad, Tensor gate_up, std::string activation, double limit,
                       double alpha) {
  check_matrix(gate_up, "gate_up");
  check_matrix(grad, "grad");
  const Activation chosen = activation_of(activation, limit, alpha);
  const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  UNIMOE_CHECK(grad.size(0) == rows && grad.size(1) == width, "grad (shape ", shape_of(grad),
               ") must be [", rows, ", ", width, "]");
  UNIMOE_CHECK(grad.scalar_type() == gate_up.scalar_type(), "grad must have the dtype of gate_up");
  Tensor out = empty({rows, 2 * width}, gate_up.scalar_type(), gate_up);
  const Kernels& fast = kernels();
  dispatch_floating(gate_up.scalar_type(), "gate_up", [&](auto element) {
    using T = decltype(element);
    const T* from = const_data<T>(gate_up);
    const T* grads = const_data<T>(grad);
    T* to = mutable_data<T>(out);
    torch::stable::parallel_for(
        0, rows, activated_rows_per_task(width), [&](int64_t begin, int64_t end) {
          for (int64_t row = begin; row < end; ++row) {
            const T* gate = from + row * 2 * width;
            T* out_gate = to + row * 2 * width;
            activate_row_backward<T>(chosen, fast, width, 1, grads + row * width, gate,
                                     gate + width, nullptr, out_gate, out_gate + width);
          }
        });
  });
  return out;
}

}  // namespace
}  // namespace unimoe

STABLE_TORCH_LIBRARY_IMPL(unimoe, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&unimoe::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&unimoe::swiglu_backward));
}
