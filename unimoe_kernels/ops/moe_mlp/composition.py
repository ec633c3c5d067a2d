"""`moe_mlp` and its gradient, composed of other operators.

Forward, for the `N = T * K` routed rows sorted by expert, with scores `s` and activation `act`:

    X = permute(x)    H = X W1' + b1    A = act(H)    Y = A W2' + b2    y = unpermute(Y, s)

The backward requires x, H, the scores and the sort, but neither Y nor A: with `dO = permute(dy)`,

    dA' = dO W2    dS = rowsum(dA' * A) + rowsum(dO * b2)    dH = act'(H)[s * dA']
    dW2 = (s * dO)' A    dW1 = dH' X    dx = unpermute(dH W1)
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from unimoe_kernels import _backends
from unimoe_kernels.ops.moe_mlp.arguments import ExpertWeights, Gate, Grads, Needs, Rows, Saved
from unimoe_kernels.ops.moe_mlp.pipeline import multiply, run_pipeline
from unimoe_kernels.quantization.weight import QuantizedWeight

PARTS = ("expert_sort", "permute", "unpermute", "grouped_mm", "swiglu")


def forward(
    backend: str,
    x: Tensor,
    ids: Tensor,
    scores: Tensor,
    weights: ExpertWeights,
    gate: Gate,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor, Rows]:
    """Returns y, the pre-activations H (without rows if not kept) and the order of the rows."""
    run = partial(_backends.run, backend)
    y_TD, h_NG, rows = run_pipeline(
        run, x, ids, scores, weights, lambda h_NG: run("swiglu", h_NG, *gate)
    )
    return y_TD, h_NG if keep_hidden else h_NG.new_empty((0, h_NG.shape[1])), rows


def backward(backend: str, grad_TD: Tensor, saved: Saved, gate: Gate, needs: Needs) -> Grads:
    """Returns the gradients; those that are not required are empty, or a by-product.

    Quantised weights have no gradient: with them, bias gradients are computed for weights without
    columns.
    """
    x, scores, weights, h_NG, rows = saved
    quantized = isinstance(weights.down, QuantizedWeight)
    run, offsets, top_k = partial(_backends.run, backend), rows.offsets, scores.shape[1]
    floats = () if quantized else (weights.first, weights.down)
    recorded = _backends.is_recorded(grad_TD, x, *floats, scores, h_NG, weights.down_bias)
    weigh = _weighed if recorded else Tensor.mul_
    grad_x, grad_first, grad_down, grad_scores, grad_first_bias, grad_down_bias = (
        x.new_empty(0) for _ in needs
    )
    # Scores of another rank's rows may have any value: no matmul reads these rows.
    scores_N1 = scores.view(-1, 1).index_select(0, rows.order)
    grad_ND = run("permute", grad_TD, rows.inverse, offsets, top_k)
    needs_hidden = needs.x or needs.first or needs.first_bias
    if needs.scores or needs_hidden:
        grad_a_NF = multiply(run, grad_ND, weights.down, offsets, transposed=True)
    if needs.scores or needs.down or needs.down_bias:
        a_NF = run("swiglu", h_NG, *gate)
    if needs.scores:
        grad_scores_N = (grad_a_NF.to(scores.dtype) * a_NF).sum(1)
        if weights.down_bias is not None:
            bias_ND = weights.down_bias.index_select(0, _expert_of_row(rows))
            grad_scores_N = grad_scores_N + (grad_ND.to(scores.dtype) * bias_ND).sum(1)
        grad_scores = grad_scores_N.index_select(0, rows.inverse).view(scores.shape)
    # The gradient of the scores uses both factors unscaled; everything below, scaled by the scores.
    if needs.down or needs.down_bias:
        grad_down, grad_down_bias = run(
            "grouped_mm_wgrad",
            weigh(grad_ND, scores_N1),
            a_NF.new_empty(a_NF.shape[0], 0) if quantized else a_NF,
            offsets,
            needs.down_bias,
        )
    if needs_hidden:
        grad_h_NG = run("swiglu_backward", weigh(grad_a_NF, scores_N1), h_NG, *gate)
    if needs.first or needs.first_bias:
        if quantized:
            x_ND = x.new_empty(h_NG.shape[0], 0)
        else:
            x_ND = run("permute", x, rows.inverse, offsets, top_k)
        grad_first, grad_first_bias = run(
            "grouped_mm_wgrad", grad_h_NG, x_ND, offsets, needs.first_bias
        )
    if needs.x:
        grad_x_ND = multiply(run, grad_h_NG, weights.first, offsets, transposed=True)
        grad_x = run("unpermute", grad_x_ND, rows.inverse, offsets, None, top_k)
    return Grads(grad_x, grad_first, grad_down, grad_scores, grad_first_bias, grad_down_bias)


def _weighed(rows: Tensor, scores: Tensor) -> Tensor:
    # As in place: 16-bit rows stay so with scores in float32.
    return (rows * scores).to(rows.dtype)


def _expert_of_row(rows: Rows) -> Tensor:
    position_N = torch.arange(rows.order.shape[0], dtype=torch.int32, device=rows.order.device)
    expert_N = torch.searchsorted(rows.offsets[1:], position_N, right=True)
    return expert_N.clamp_(max=rows.offsets.shape[0] - 2)
