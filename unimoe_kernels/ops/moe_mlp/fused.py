"""`moe_mlp` in Triton: the formulas of `composition.py` in fewer, larger kernels.

Forward: the first matmul gathers rows from tokens and applies the activation before it writes its
output; the second matmul writes rows in expert order, which a last kernel gathers and sums. The
sort and the sum run on the default backends of `expert_sort` and `unpermute`.

Backward: one matmul, which gathers dy, computes the gradients of scores and pre-activations and the
weighted activations. Weight gradients read permuted copies of x and dy, one at a time, each of
which is freed after its matmul. Rows of another rank are not written, and no result depends on
their content.
"""

from __future__ import annotations

from torch import Tensor

from unimoe_kernels import _backends
from unimoe_kernels.ops.grouped_mm import kernel as grouped_mm
from unimoe_kernels.ops.moe_mlp import kernel, kernel_backward
from unimoe_kernels.ops.moe_mlp.arguments import ExpertWeights, Gate, Grads, Needs, Rows, Saved
from unimoe_kernels.ops.moe_mlp.pipeline import sort_rows
from unimoe_kernels.ops.unpermute import kernel as unpermute


def forward(
    x: Tensor,
    ids: Tensor,
    scores: Tensor,
    weights: ExpertWeights,
    gate: Gate,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor, Rows]:
    """Returns the same as `composition.forward`."""
    top_k = ids.shape[1]
    rows = sort_rows(_backends.call, ids, weights.first.shape[0])
    a_NF, h_NG = kernel.gated(
        x, weights.first, weights.first_bias, rows.offsets, rows.order, top_k, gate, keep_hidden
    )
    y_ND = grouped_mm.grouped_mm(a_NF, weights.down, rows.offsets, weights.down_bias, tail=False)
    y_TD = _backends.call("unpermute", y_ND, rows.inverse, rows.offsets, scores, top_k)
    return y_TD, h_NG, rows


def backward(grad_TD: Tensor, saved: Saved, gate: Gate, needs: Needs) -> Grads:
    """Returns the same as `composition.backward`."""
    x, scores, weights, h_NG, rows = saved
    offsets, top_k = rows.offsets, scores.shape[1]
    grad_x, grad_first, grad_down, grad_first_bias, grad_down_bias = (
        x.new_empty(0) for _ in range(5)
    )
    grad_scores, grad_h_NG, weighted_NF = kernel_backward.gated_backward(
        grad_TD,
        weights.down,
        weights.down_bias,
        scores,
        h_NG,
        offsets,
        rows.order,
        gate,
        needs.scores,
        needs.x or needs.first or needs.first_bias,
        needs.down or needs.down_bias,
    )
    if needs.down or needs.down_bias:
        grad_ND = _backends.call("permute", grad_TD, rows.inverse, offsets, top_k)
        grad_down, grad_down_bias = grouped_mm.grouped_mm_wgrad(
            grad_ND, weighted_NF, offsets, needs.down_bias, scores, rows.order
        )
        del grad_ND, weighted_NF
    if needs.first or needs.first_bias:
        x_ND = _backends.call("permute", x, rows.inverse, offsets, top_k)
        grad_first, grad_first_bias = grouped_mm.grouped_mm_wgrad(
            grad_h_NG, x_ND, offsets, needs.first_bias
        )
        del x_ND
    if needs.x:
        grad_x_ND = grouped_mm.grouped_mm(
            grad_h_NG, weights.first.transpose(1, 2), offsets, None, tail=False
        )
        grad_x = unpermute.unpermute(grad_x_ND, rows.inverse, offsets, None, top_k)
    return Grads(grad_x, grad_first, grad_down, grad_scores, grad_first_bias, grad_down_bias)
