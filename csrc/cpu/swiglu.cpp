// Gated activations: silu in vectors, the others number by number.
#include <cmath>
#include <string>

#include "check.h"
#include "kernels.h"

namespace unimoe {
namespace {

constexpr int64_t kNumbersPerTask = 16 * 1024;

enum class Gate { kSilu, kGelu, kGeluTanh, kRelu, kClamped };

Gate gate_of(const std::string& activation) {
  if (activation == "silu") return Gate::kSilu;
  if (activation == "gelu") return Gate::kGelu;
  if (activation == "gelu_tanh") return Gate::kGeluTanh;
  if (activation == "relu") return Gate::kRelu;
  UNIMOE_CHECK(activation == "swiglu_clamped", "activation (", activation, ") is unknown");
  return Gate::kClamped;
}

template <typename S>
struct Activated {
  S value;
  S slope;
};

template <typename S>
S sigmoid(S x) {
  return S(1) / (S(1) + std::exp(-x));
}

// The activation of one gate and its derivative.
template <typename S>
Activated<S> activate(Gate kind, S x, S alpha) {
  switch (kind) {
    case Gate::kGelu: {
      const S cdf = S(0.5) * (S(1) + std::erf(x * S(M_SQRT1_2)));
      const S density = std::exp(S(-0.5) * x * x) * S(M_2_SQRTPI * M_SQRT1_2 / 2);
      return {x * cdf, cdf + x * density};
    }
    case Gate::kGeluTanh: {
      const S scale = S(M_2_SQRTPI * M_SQRT1_2), cubic = S(0.044715);
      const S t = std::tanh(scale * (x + cubic * x * x * x));
      const S inner = scale * (S(1) + S(3) * cubic * x * x);
      return {S(0.5) * x * (S(1) + t), S(0.5) * (S(1) + t) + S(0.5) * x * (S(1) - t * t) * inner};
    }
    case Gate::kRelu:
      return {x > S(0) ? x : S(0), x > S(0) ? S(1) : S(0)};
    default: {
      const S factor = kind == Gate::kClamped ? alpha : S(1);
      const S open = sigmoid(factor * x);
      return {x * open, open * (S(1) + factor * x * (S(1) - open))};
    }
  }
}

// Widths that NaN passes through, as in torch: only what is larger is cut.
template <typename S>
S cut(S x, S low, S high) {
  return x < low ? low : (x > high ? high : x);
}

template <typename T>
void forward_row(Gate kind, int64_t width, const T* gate, const T* up, double limit, double alpha,
                 T* out) {
  using S = Accumulator<T>;
  for (int64_t i = 0; i < width; ++i) {
    S g = static_cast<S>(gate[i]), u = static_cast<S>(up[i]);
    if (kind == Gate::kClamped) {
      g = g > S(limit) ? S(limit) : g;
      u = cut(u, S(-limit), S(limit)) + S(1);
    }
    out[i] = static_cast<T>(activate<S>(kind, g, S(alpha)).value * u);
  }
}

template <typename T>
void backward_row(Gate kind, int64_t width, const T* grad, const T* gate, const T* up, double limit,
                  double alpha, T* grad_gate, T* grad_up) {
  using S = Accumulator<T>;
  for (int64_t i = 0; i < width; ++i) {
    const S d = static_cast<S>(grad[i]);
    S g = static_cast<S>(gate[i]), u = static_cast<S>(up[i]);
    bool gate_open = true, up_open = true;
    if (kind == Gate::kClamped) {
      gate_open = g <= S(limit);
      up_open = u >= S(-limit) && u <= S(limit);
      g = g > S(limit) ? S(limit) : g;
      u = cut(u, S(-limit), S(limit)) + S(1);
    }
    const Activated<S> activated = activate<S>(kind, g, S(alpha));
    grad_gate[i] = static_cast<T>(gate_open ? d * u * activated.slope : S(0));
    grad_up[i] = static_cast<T>(up_open ? d * activated.value : S(0));
  }
}

int64_t rows_per_task(int64_t width) {
  return std::max<int64_t>(1, kNumbersPerTask / std::max<int64_t>(1, width));
}

Tensor swiglu(Tensor gate_up, std::string activation, double limit, double alpha) {
  check_matrix(gate_up, "gate_up");
  check_floating(gate_up, "gate_up");
  const Gate kind = gate_of(activation);
  const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  UNIMOE_CHECK(gate_up.size(1) == 2 * width, "gate_up (shape ", shape_of(gate_up),
               ") must have an even last size");
  Tensor out = empty({rows, width}, gate_up.scalar_type(), gate_up);
  const Kernels& fast = kernels();
  dispatch_floating(gate_up.scalar_type(), "gate_up", [&](auto element) {
    using T = decltype(element);
    const T* from = const_data<T>(gate_up);
    T* to = mutable_data<T>(out);
    torch::stable::parallel_for(0, rows, rows_per_task(width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* gate = from + row * 2 * width;
        if constexpr (std::is_same_v<T, float>) {
          if (kind == Gate::kSilu) {
            fast.silu_mul(width, gate, gate + width, to + row * width);
            continue;
          }
        }
        if constexpr (std::is_same_v<T, BFloat16>) {
          if (kind == Gate::kSilu) {
            const auto* bits = reinterpret_cast<const uint16_t*>(gate);
            fast.silu_mul_bfloat16(width, bits, bits + width,
                                   reinterpret_cast<uint16_t*>(to + row * width));
            continue;
          }
        }
        forward_row(kind, width, gate, gate + width, limit, alpha, to + row * width);
      }
    });
  });
  return out;
}

Tensor swiglu_backward(Tensor grad, Tensor gate_up, std::string activation, double limit,
                       double alpha) {
  check_matrix(gate_up, "gate_up");
  check_matrix(grad, "grad");
  const Gate kind = gate_of(activation);
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
    torch::stable::parallel_for(0, rows, rows_per_task(width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* gate = from + row * 2 * width;
        const T* d = grads + row * width;
        T* out_gate = to + row * 2 * width;
        if constexpr (std::is_same_v<T, float>) {
          if (kind == Gate::kSilu) {
            fast.silu_mul_backward(width, d, gate, gate + width, out_gate, out_gate + width);
            continue;
          }
        }
        if constexpr (std::is_same_v<T, BFloat16>) {
          if (kind == Gate::kSilu) {
            const auto* bits = reinterpret_cast<const uint16_t*>(gate);
            auto* out_bits = reinterpret_cast<uint16_t*>(out_gate);
            fast.silu_mul_backward_bfloat16(width, reinterpret_cast<const uint16_t*>(d), bits,
                                            bits + width, out_bits, out_bits + width);
            continue;
          }
        }
        backward_row(kind, width, d, gate, gate + width, limit, alpha, out_gate, out_gate + width);
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
