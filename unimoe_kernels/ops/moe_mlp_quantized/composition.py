"""`moe_mlp_quantized` and its backward: the formulas of `moe_mlp` with quantised matmuls."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from unimoe_kernels import _backends
from unimoe_kernels.ops.moe_mlp import composition
from unimoe_kernels.ops.moe_mlp.arguments import ExpertWeights, Gate, Needs, Rows, Saved
from unimoe_kernels.ops.moe_mlp.pipeline import pre_activations
from unimoe_kernels.ops.moe_mlp_quantized.arguments import NUM_WEIGHTS, unflatten

PARTS = (*composition.PARTS, "grouped_mm_quantized")

# Gradients of x, scores and both biases.
Grads = tuple[Tensor, Tensor, Tensor, Tensor]


def forward(backend: str, x: Tensor, ids: Tensor, scores: Tensor, *flat) -> tuple[Tensor, ...]:
    """Returns y, the pre-activations (zero rows unless kept), and the order of the rows."""
    weights = unflatten(*flat[:NUM_WEIGHTS])
    *gate, keep_hidden = flat[NUM_WEIGHTS:]
    y, hidden, rows = composition.forward(
        backend, x, ids, scores, weights, Gate(*gate), keep_hidden
    )
    return y, hidden, *rows


def backward(backend: str, grad: Tensor, x: Tensor, scores: Tensor, hidden: Tensor, *flat) -> Grads:
    """Returns the gradients of x, scores and both biases; those not needed may be empty."""
    rows, flat = Rows(*flat[:3]), flat[3:]
    weights = unflatten(*flat[:NUM_WEIGHTS])
    *gate, needs = flat[NUM_WEIGHTS:]
    saved = Saved(x, scores, weights, hidden, rows)
    return gradients(backend, grad, saved, Gate(*gate), needs)


def gradients(backend: str, grad: Tensor, saved: Saved, gate: Gate, needs: list[bool]) -> Grads:
    """Same as `backward`, with structures as arguments."""
    x, scores, first_bias, down_bias = needs
    wanted = Needs(x, False, False, scores, first_bias, down_bias)
    found = composition.backward(backend, grad, saved, gate, wanted)
    return found.x, found.scores, found.first_bias, found.down_bias


def recorded_gradients(
    backend: str,
    grad: Tensor,
    x: Tensor,
    scores: Tensor,
    weights: ExpertWeights,
    rows: Rows,
    gate: Gate,
    needs: list[bool],
) -> Grads:
    """Returns gradients for double backward: pre-activations are recomputed and recorded."""
    run = partial(_backends.run, backend)
    _, hidden = pre_activations(run, x, weights, rows, scores.shape[1])
    return gradients(backend, grad, Saved(x, scores, weights, hidden, rows), gate, needs)
