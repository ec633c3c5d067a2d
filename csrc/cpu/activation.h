// Gated activations of one row: silu is vectorised, the others are computed element by element.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>

#include "check.h"
#include "kernels.h"

namespace unimoe {

// Minimum number of rows per thread.
inline int64_t activated_rows_per_task(int64_t width) {
  constexpr int64_t kNumbersPerTask = 16 * 1024;
  return std::max<int64_t>(1, kNumbersPerTask / std::max<int64_t>(1, width));
}

enum class Gate { kSilu, kGelu, kGeluTanh, kRelu, kClamped };

// `limit` and `alpha` are used by kClamped only.
struct Activation {
  Gate gate;
  double limit;
  double alpha;
};

inline Activation activation_of(const std::string& name, double limit, double alpha) {
  if (name == "silu") return {Gate::kSilu, limit, alpha};
  if (name == "gelu") return {Gate::kGelu, limit, alpha};
  if (name == "gelu_tanh") return {Gate::kGeluTanh, limit, alpha};
  if (name == "relu") return {Gate::kRelu, limit, alpha};
  UNIMOE_CHECK(name == "swiglu_clamped", "activation (", name, ") is unknown");
  return {Gate::kClamped, limit, alpha};
}

template <typename S>
struct Activated {
  S value;
  S slope;
};

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
      // NaN is not <= 0: NaN and its gradient propagate, as in torch.
      return {x <= S(0) ? S(0) : x, x <= S(0) ? S(0) : S(1)};
    default: {
      const S factor = kind == Gate::kClamped ? alpha : S(1);
      const S open = S(1) / (S(1) + std::exp(-factor * x));
      return {x * open, open * (S(1) + factor * x * (S(1) - open))};
    }
  }
}

// Gate and up after clamping.
template <typename S>
struct Pair {
  S gate;
  S up;
};

// The clamps propagate NaN, as in torch, because a comparison with NaN is false.
template <typename S>
Pair<S> clamped(const Activation& activation, S gate, S up) {
  if (activation.gate != Gate::kClamped) return {gate, up};
  const S limit = S(activation.limit);
  up = up < -limit ? -limit : (up > limit ? limit : up);
  return {gate > limit ? limit : gate, up + S(1)};
}

// out = act(gate) * up.
template <typename T>
void activate_row(const Activation& activation, const Kernels& kernels, int64_t width,
                  const T* gate, const T* up, T* out) {
  using S = Accumulator<T>;
  if constexpr (std::is_same_v<T, float>) {
    if (activation.gate == Gate::kSilu) return kernels.silu_mul(width, gate, up, out);
  }
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (activation.gate == Gate::kSilu) {
      return kernels.silu_mul_bfloat16(width, bits_of(gate), bits_of(up), bits_of(out));
    }
  }
  for (int64_t i = 0; i < width; ++i) {
    const Pair<S> pair = clamped(activation, static_cast<S>(gate[i]), static_cast<S>(up[i]));
    const Activated<S> activated = activate<S>(activation.gate, pair.gate, S(activation.alpha));
    out[i] = static_cast<T>(activated.value * pair.up);
  }
}

// Computes the gradient of score * act(gate) * up, writes this product to `out` unless it is null,
// and returns the gradient of the score.
template <typename T>
Accumulator<T> activate_row_backward(const Activation& activation, const Kernels& kernels,
                                     int64_t width, Accumulator<T> score, const T* grad,
                                     const T* gate, const T* up, T* out, T* grad_gate, T* grad_up) {
  using S = Accumulator<T>;
  if constexpr (std::is_same_v<T, float>) {
    if (activation.gate == Gate::kSilu) {
      return kernels.silu_mul_backward(width, score, grad, gate, up, out, grad_gate, grad_up);
    }
  }
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (activation.gate == Gate::kSilu) {
      return kernels.silu_mul_backward_bfloat16(
          width, score, bits_of(grad), bits_of(gate), bits_of(up),
          out == nullptr ? nullptr : bits_of(out), bits_of(grad_gate), bits_of(grad_up));
    }
  }
  const bool clamps = activation.gate == Gate::kClamped;
  const bool rectifies = activation.gate == Gate::kRelu;
  const S limit = S(activation.limit);
  S grad_score = 0;
  for (int64_t i = 0; i < width; ++i) {
    const S d = static_cast<S>(grad[i]), g = static_cast<S>(gate[i]), u = static_cast<S>(up[i]);
    // Clamped elements have gradient 0, even if multiplied by infinity.
    const bool gate_open = clamps ? g <= limit : !(rectifies && g <= S(0));
    const bool up_open = !clamps || (u >= -limit && u <= limit);
    const Pair<S> pair = clamped(activation, g, u);
    const Activated<S> activated = activate<S>(activation.gate, pair.gate, S(activation.alpha));
    const S product = activated.value * pair.up, scored = d * score;
    grad_score += d * product;
    if (out != nullptr) out[i] = static_cast<T>(score * product);
    grad_gate[i] = static_cast<T>(gate_open ? scored * pair.up * activated.slope : S(0));
    grad_up[i] = static_cast<T>(up_open ? scored * activated.value : S(0));
  }
  return grad_score;
}

}  // namespace unimoe
