"""`moe_mlp` and its gradient, composed of other operators.

Forward, in rows `N = T * K` sorted by expert, with scores `s` and activation `act`:

    X = permute(x)    H = X W1' + b1    A = act(H)    Y = A W2' + b2    y = unpermute(Y, s)

Backward keeps x, H, the scores and the sort, and needs neither Y nor A: with `dO = permute(dy)`,

    dA' = dO W2    dS = rowsum(dA' * A) + rowsum(dO * b2)    dH = act'(H)[s * dA']
    dW2 = (s * dO)' A    dW1 = dH' X    dx = unpermute(dH W1)
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from unimoe_kernels import _backends

PARTS = ("expert_sort", "permute", "unpermute", "grouped_mm", "swiglu")


def forward(
    backend: str,
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
    """Returns y and what the backward keeps: H (or none of its rows), both orders, the offsets."""
    run, top_k = partial(_backends.run, backend), ids.shape[1]
    row_order, inverse_order, _, offsets = run("expert_sort", ids.view(-1), gate_up_proj.shape[0])
    h_NG = pre_activations(backend, x, gate_up_proj, gate_up_bias, row_order, offsets, top_k)
    a_NF = run("swiglu", h_NG, activation, limit, alpha)
    y_ND = run("grouped_mm", a_NF, down_proj, offsets, down_bias)
    y_TD = run("unpermute", y_ND, inverse_order, offsets, scores, top_k)
    h_NG = h_NG if keep_hidden else h_NG.new_empty((0, h_NG.shape[1]))
    return y_TD, h_NG, row_order, inverse_order, offsets


def pre_activations(
    backend: str,
    x: Tensor,
    gate_up_proj: Tensor,
    gate_up_bias: Tensor | None,
    row_order: Tensor,
    offsets: Tensor,
    top_k: int,
) -> Tensor:
    """Returns H `[N, 2F]`."""
    run = partial(_backends.run, backend)
    x_ND = run("permute", x, row_order, offsets, top_k)
    return run("grouped_mm", x_ND, gate_up_proj, offsets, gate_up_bias)


def backward(
    backend: str,
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
    """Returns the gradients of x, both projections, scores and both biases.

    Those that `needs` does not ask for are empty, or come along where they cost nothing more.
    """
    needs_x, needs_gate_up, needs_down, needs_scores, needs_gate_up_bias, needs_down_bias = needs
    run = partial(_backends.run, backend)
    recorded = _backends.is_recorded(grad_TD, x, gate_up_proj, down_proj, scores, h_NG, down_bias)
    weigh = Tensor.mul if recorded else Tensor.mul_
    top_k = scores.shape[1]
    gate = (activation, limit, alpha)
    grad_x, grad_gate_up, grad_down, grad_scores, grad_gate_up_bias, grad_down_bias = (
        x.new_empty(0) for _ in needs
    )
    # Whatever the scores of another rank's rows are: none of the matmuls reads these rows.
    scores_N1 = scores.view(-1, 1).index_select(0, row_order)
    grad_ND = run("permute", grad_TD, row_order, offsets, top_k)
    needs_hidden = needs_x or needs_gate_up or needs_gate_up_bias
    if needs_scores or needs_hidden:
        grad_a_NF = run("grouped_mm", grad_ND, down_proj.transpose(1, 2), offsets, None)
    if needs_scores or needs_down or needs_down_bias:
        a_NF = run("swiglu", h_NG, *gate)
    if needs_scores:
        grad_scores_N = (grad_a_NF.to(scores.dtype) * a_NF).sum(1)
        if down_bias is not None:
            bias_ND = down_bias.index_select(0, _expert_of_row(row_order, offsets))
            grad_scores_N = grad_scores_N + (grad_ND.to(scores.dtype) * bias_ND).sum(1)
        grad_scores = grad_scores_N.index_select(0, inverse_order).view(scores.shape)
    # The scores' gradient wanted both without the scores; everything from here wants them with.
    if needs_down or needs_down_bias:
        grad_down, grad_down_bias = run(
            "grouped_mm_wgrad", weigh(grad_ND, scores_N1), a_NF, offsets, needs_down_bias
        )
    if needs_hidden:
        grad_h_NG = run("swiglu_backward", weigh(grad_a_NF, scores_N1), h_NG, *gate)
    if needs_gate_up or needs_gate_up_bias:
        x_ND = run("permute", x, row_order, offsets, top_k)
        grad_gate_up, grad_gate_up_bias = run(
            "grouped_mm_wgrad", grad_h_NG, x_ND, offsets, needs_gate_up_bias
        )
    if needs_x:
        grad_x_ND = run("grouped_mm", grad_h_NG, gate_up_proj.transpose(1, 2), offsets, None)
        grad_x = run("unpermute", grad_x_ND, inverse_order, offsets, None, top_k)
    return grad_x, grad_gate_up, grad_down, grad_scores, grad_gate_up_bias, grad_down_bias


def _expert_of_row(row_order: Tensor, offsets: Tensor) -> Tensor:
    position_N = torch.arange(row_order.shape[0], dtype=torch.int32, device=row_order.device)
    expert_N = torch.searchsorted(offsets[1:], position_N, right=True)
    return expert_N.clamp_(max=offsets.shape[0] - 2)
