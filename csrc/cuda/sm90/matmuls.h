// The matmuls for compute capability 9.0, as C++ functions that check the requirements of their
// kernels and launch them. bfloat16 and float16; every size is a multiple of 8, and every operand
// begins at a multiple of 16 bytes.
//
// Rows are in expert order, those of expert e from offsets[e] to offsets[e + 1] - 1. Results repeat
// bit for bit.
#pragma once

#include "stable.h"

namespace unimoe::sm90 {

// y [N, F] = x [N, D] times weight [E, F, D], either of whose last two strides is 1. Rows that no
// expert owns are zeros with `zero_tail`, and are not written without.
void matmul_rows(const Tensor& x, const Tensor& weight, const Tensor& offsets, bool zero_tail,
                 Tensor& y);

// grad_weight [E, F, D] = grad [N, F]' times x [N, D] for each expert, zeros for one without rows.
void weight_gradient(const Tensor& grad, const Tensor& x, const Tensor& offsets,
                     Tensor& grad_weight);

// act [N, F] = silu(gate) * up of the rows x[order[i] / top_k] of x [T, D] times gate_up
// [E, 2F, D], gate rows first. The pre-activations go to hidden [N, 2F], if there is one.
void gated(const Tensor& x, const Tensor& gate_up, const Tensor& offsets, const Tensor& order,
           int64_t top_k, Tensor& act, Tensor* hidden);

// The gradients of `gated`'s pre-activations [N, 2F] and of the scores [T, K], and the activations
// times the scores [N, F], each written where there is a tensor for it. From grad [T, D] of the
// layer's output, down [E, D, F] and hidden [N, 2F].
void gated_backward(const Tensor& grad, const Tensor& down, const Tensor& scores,
                    const Tensor& hidden, const Tensor& offsets, const Tensor& order,
                    const Tensor& inverse, Tensor* grad_hidden, Tensor* weighted,
                    Tensor* grad_scores);

}  // namespace unimoe::sm90
