"""`moe_mlp` in Triton: the formulas of `composition.py` in fewer, larger kernels.

Forward: rows are gathered from tokens inside the first matmul, whose sums are activated before they
are written; the second matmul writes rows in expert order, and one pass gathers and sums them.

Backward: one matmul gives the gradients of scores and pre-activations and the weighted activations;
x and dy are gathered inside the matmuls that need them. Rows of another rank are not written, and
nothing depends on what is in them.
"""

from __future__ import annotations

from torch import Tensor

from unimoe_kernels.ops.expert_sort import kernel as expert_sort
from unimoe_kernels.ops.grouped_mm import kernel as grouped_mm
from unimoe_kernels.ops.moe_mlp import kernel, kernel_backward
from unimoe_kernels.ops.unpermute import kernel as unpermute


def forward(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    ids: Tensor,
    scores: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    limit: float,
    alpha: float,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns what `composition.forward` returns."""
    top_k, gate = ids.shape[1], (activation, limit, alpha)
    row_order, inverse_order, _, offsets = expert_sort.expert_sort(
        ids.view(-1), gate_up_proj.shape[0]
    )
    a_NF, h_NG = kernel.gated(
        x, gate_up_proj, gate_up_bias, offsets, row_order, top_k, gate, keep_hidden
    )
    y_ND = grouped_mm.grouped_mm(a_NF, down_proj, offsets, down_bias, tail=False)
    y_TD = unpermute.unpermute(y_ND, inverse_order, offsets, scores, top_k)
    return y_TD, h_NG, row_order, inverse_order, offsets


def backward(
    grad_TD: Tensor,
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    scores: Tensor,
    h_NG: Tensor,
    row_order: Tensor,
    inverse_order: Tensor,
    offsets: Tensor,
    down_bias: Tensor | None,
    activation: str,
    limit: float,
    alpha: float,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Returns what `composition.backward` returns."""
    needs_x, needs_gate_up, needs_down, needs_scores, needs_gate_up_bias, needs_down_bias = needs
    top_k = scores.shape[1]
    grad_x, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias = (
        x.new_empty(0) for _ in range(5)
    )
    grad_scores, grad_h_NG, weighted_NF = kernel_backward.gated_backward(
        grad_TD,
        down_proj,
        down_bias,
        scores,
        h_NG,
        offsets,
        row_order,
        (activation, limit, alpha),
        needs_scores,
        needs_x or needs_gate_up or needs_gate_up_bias,
        needs_down or needs_down_bias,
    )
    if needs_down or needs_down_bias:
        grad_down, grad_down_bias = grouped_mm.grouped_mm_wgrad(
            grad_TD,
            weighted_NF,
            offsets,
            needs_down_bias,
            row_order,
            grad_top_k=top_k,
            scores=scores,
        )
    if needs_gate_up or needs_gate_up_bias:
        grad_gate_up, grad_gate_up_bias = grouped_mm.grouped_mm_wgrad(
            grad_h_NG, x, offsets, needs_gate_up_bias, row_order, x_top_k=top_k
        )
    if needs_x:
        grad_x_ND = grouped_mm.grouped_mm(
            grad_h_NG, gate_up_proj.transpose(1, 2), offsets, None, tail=False
        )
        grad_x = unpermute.unpermute(grad_x_ND, inverse_order, offsets, None, top_k)
    return grad_x, grad_gate_up, grad_down, grad_scores, grad_gate_up_bias, grad_down_bias
