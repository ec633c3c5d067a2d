// Grouped matmuls for few rows per expert. They are correct for any number of rows; reading the
// weights of experts with rows is the bottleneck. Compute capability 8.0 or later, bfloat16 and
// float16.
//
// Rows are in expert order, those of expert e from offsets[e] to offsets[e + 1] - 1; rows from
// offsets[E] on are not written. Results repeat bit for bit. The inner size is a multiple of 8
// elements; x and both weights start at a multiple of 16 bytes.
#pragma once

#include "stable.h"

namespace unimoe {

// act [N, F] = silu(gate) * up, of the rows x[order[i] / top_k] of x [T, D] times gate_up
// [E, 2F, D], gate rows first. Products are summed in float32 and rounded once, after the gate.
void few_rows_gated(const Tensor& x, const Tensor& gate_up, const Tensor& offsets,
                    const Tensor& order, int64_t top_k, Tensor& act);

// y [N, F], row i of expert e: weight[e] times x[i], of x [N, D] and weight [E, F, D].
void few_rows_matmul(const Tensor& x, const Tensor& weight, const Tensor& offsets, Tensor& y);

}  // namespace unimoe
