"""`moe_mlp`: the experts of a layer as one operator that saves little for its backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from unimoe_kernels import _backends, _checks
from unimoe_kernels.ops import cuda_matmul
from unimoe_kernels.ops.moe_mlp import compiled, composition, packed
from unimoe_kernels.ops.moe_mlp.arguments import ExpertWeights, Gate, Grads, Needs, Rows, Saved
from unimoe_kernels.ops.moe_mlp.checks import check_experts
from unimoe_kernels.ops.moe_mlp.pipeline import pre_activations
from unimoe_kernels.ops.swiglu.op import ACTIVATIONS


def moe_mlp(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    ids: Tensor,
    scores: Tensor,
    *,
    activation: str = "silu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    limit: float = 7.0,
    alpha: float = 1.702,
) -> Tensor:
    """Runs each token through its K experts and sums the results, weighted by score.

    `y[t] = sum_k scores[t, k] * expert(ids[t, k], x[t])` with
    `expert(e, v) = down_proj[e] @ act(gate_up_proj[e] @ v + gate_up_bias[e]) + down_bias[e]`, where
    `act` is `swiglu` with the given activation.

    Example:
        >>> # one expert with a score of 1 equals the feed-forward block
        >>> x, gate_up_proj, down_proj = torch.ones(3, 2), torch.ones(1, 8, 2), torch.ones(1, 2, 4)
        >>> ids, scores = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
        >>> y = moe_mlp(x, gate_up_proj, down_proj, ids, scores)
        >>> torch.allclose(y, swiglu(x @ gate_up_proj[0].T) @ down_proj[0].T)
        True

    Args:
        x: `[T, D]`, float16, bfloat16, float32 or float64, any strides.
        gate_up_proj: `[E, 2F, D]`, gate rows first, dtype and device of `x`.
        down_proj: `[E, D, F]`, dtype and device of `x`.
        ids: `[T, K]`, int32 or int64. A choice with a value of E or more belongs to another rank or
            to no expert: it is dropped and adds 0.
        scores: `[T, K]`, any floating dtype, used in float32 (float64 for float64 `x`).
        activation: As in `swiglu`, with its `limit` and `alpha`.
        gate_up_bias: `[E, 2F]` or None.
        down_bias: `[E, D]` or None.
        limit: Clamp of `"swiglu_clamped"`.
        alpha: Slope of `"swiglu_clamped"`.

    Returns:
        `[T, D]`, dtype of `x` (under `torch.autocast` that of torch's matmuls), contiguous.

    Raises:
        ValueError: If shapes do not match, devices differ or `activation` is unknown. With
            `UNIMOE_CHECKS=1` also if an id is negative (otherwise it is dropped as well).
        TypeError: If dtypes differ or are not among those above.

    Note:
        Differentiable in everything but `ids`; deterministic. Saves for the backward `x`, the
        pre-activations `[N, 2F]`, the scores, two int32 orders `[N]` and the offsets.
    """
    x, *weights = _checks.autocast(x, gate_up_proj, down_proj, gate_up_bias, down_bias)
    weights = ExpertWeights(*weights)
    check_experts(x, ids, scores, weights)
    _checks.check_choice("activation", activation, ACTIVATIONS)
    return _run(x, ids, scores, weights, Gate(activation, limit, alpha))


def _run(x: Tensor, ids: Tensor, scores: Tensor, weights: ExpertWeights, gate: Gate) -> Tensor:
    """Runs `moe_mlp` on arguments that have been checked."""
    keep_hidden = _backends.is_recorded(x, scores, *weights)
    backend = None if _backends.is_captured() else _backends.backend_of("moe_mlp", x)
    _checks.check_ids(ids)
    wide = _checks.accumulation_dtype(x.dtype)
    scores = scores if scores.dtype == wide else scores.to(wide)
    x, ids, scores = x.contiguous(), ids.contiguous(), scores.contiguous()
    first, down, *biases = weights
    if x.is_cpu and backend == "cpp" and not keep_hidden:
        panels = packed.panels_of(first, down) or (None, None)
        return packed.infer(x, first, down, *panels, ids, scores, *biases, *gate)
    if backend == "cuda" and not keep_hidden and compiled.takes(x, ids, weights, gate, False):
        return compiled.infer(x, ids, scores, weights)
    return _backends.call("moe_mlp", x, first, down, ids, scores, *biases, *gate, keep_hidden)[0]


def _arguments(
    x,
    gate_up_proj,
    down_proj,
    ids,
    scores,
    gate_up_bias,
    down_bias,
    activation,
    limit,
    alpha,
    keep_hidden,
):
    """Groups the arguments of the schema into those of an implementation."""
    weights = ExpertWeights(gate_up_proj, down_proj, gate_up_bias, down_bias)
    return x, ids, scores, weights, Gate(activation, limit, alpha), keep_hidden


def _forward(implementation: Callable, *flat):
    x, ids, scores, weights, *options = _arguments(*flat)
    y, hidden, rows = implementation(x, ids, scores, weights, *options)
    return y, hidden, *rows


def _fake(*flat):
    x, ids, _, weights, _, keep_hidden = _arguments(*flat)
    num_experts, double_width, _ = weights.first.shape
    num_rows = ids.shape[0] * ids.shape[1]
    return (
        x.new_empty(x.shape),
        x.new_empty((num_rows if keep_hidden else 0, double_width)),
        ids.new_empty((num_rows,), dtype=torch.int32),
        ids.new_empty((num_rows,), dtype=torch.int32),
        ids.new_empty((num_experts + 1,), dtype=torch.int32),
    )


def _setup_context(ctx, inputs, output):
    x, first, down, _, scores, first_bias, down_bias, *gate, _ = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.gate = Gate(*gate)
    ctx.save_for_backward(x, scores, first, down, first_bias, down_bias, *kept)


def _backward(backend, ctx, grad, *_):
    if grad is None:
        return (None,) * 11
    x, scores, first, down, first_bias, down_bias, hidden, *rows = ctx.saved_tensors
    weights, rows = ExpertWeights(first, down, first_bias, down_bias), Rows(*rows)
    n = ctx.needs_input_grad
    needs = Needs(x=n[0], first=n[1], down=n[2], scores=n[4], first_bias=n[5], down_bias=n[6])
    grad = grad.contiguous()
    if _backends.is_recorded(grad, x, scores, *weights, hidden):
        # The saved pre-activations are not connected to their inputs in the graph.
        run = partial(_backends.run, backend)
        _, hidden = pre_activations(run, x, weights, rows, scores.shape[1])
        saved = Saved(x, scores, weights, hidden, rows)
        grads = composition.backward(backend, grad, saved, ctx.gate, needs)
    else:
        tensors = (x, first, down, scores, hidden, *rows, down_bias)
        flat = _backends.run(backend, "moe_mlp_backward", grad, *tensors, *ctx.gate, list(needs))
        grads = Grads(*flat)
    x, first, down, scores, first_bias, down_bias = (
        grad if needed else None for grad, needed in zip(grads, needs, strict=True)
    )
    return x, first, down, None, scores, first_bias, down_bias, None, None, None, None


def _backward_arguments(
    grad,
    x,
    gate_up_proj,
    down_proj,
    scores,
    gate_up_rows,
    row_order,
    inverse_order,
    offsets,
    down_bias,
    activation,
    limit,
    alpha,
    needs,
):
    """Groups the arguments of the backward's schema into those of an implementation."""
    weights = ExpertWeights(gate_up_proj, down_proj, None, down_bias)
    rows = Rows(row_order, inverse_order, offsets)
    saved = Saved(x, scores, weights, gate_up_rows, rows)
    return grad, saved, Gate(activation, limit, alpha), Needs(*needs)


def _backward_of(implementation: Callable, *flat):
    return tuple(implementation(*_backward_arguments(*flat)))


def _backward_fake(*flat):
    _, (x, scores, weights, _, _), _, needs = _backward_arguments(*flat)
    num_experts, double_width, width = weights.first.shape
    empty = (0,)
    return (
        x.new_empty(x.shape if needs.x else empty),
        x.new_empty(weights.first.shape if needs.first or needs.first_bias else empty),
        x.new_empty(weights.down.shape if needs.down or needs.down_bias else empty),
        scores.new_empty(scores.shape) if needs.scores else x.new_empty(empty),
        x.new_empty((num_experts, double_width) if needs.first_bias else empty),
        x.new_empty((num_experts, width) if needs.down_bias else empty),
    )


def _triton(*args):
    from unimoe_kernels.ops.moe_mlp import fused

    return fused.forward(*args)


def _backward_triton(*args):
    from unimoe_kernels.ops.moe_mlp import fused

    return fused.backward(*args)


_backends.declare(
    "moe_mlp_backward",
    "(Tensor grad, Tensor x, Tensor gate_up_proj, Tensor down_proj, Tensor scores, "
    "Tensor gate_up_rows, Tensor row_order, Tensor inverse_order, Tensor expert_offsets, "
    "Tensor? down_bias, str activation, float limit, float alpha, bool[] needs) -> (Tensor grad_x, "
    "Tensor grad_gate_up_proj, Tensor grad_down_proj, Tensor grad_scores, "
    "Tensor grad_gate_up_bias, Tensor grad_down_bias)",
    reference=partial(_backward_of, partial(composition.backward, "reference")),
    native=partial(_backward_of, compiled.backward),
    triton=partial(_backward_of, _backward_triton),
    parts=composition.PARTS,
    fused=True,
    fake=_backward_fake,
    public=False,
    kernels=cuda_matmul.LAYER_BACKWARD,
    proven=cuda_matmul.PROVEN,
)
_backends.declare(
    "moe_mlp",
    "(Tensor x, Tensor gate_up_proj, Tensor down_proj, Tensor ids, Tensor scores, "
    "Tensor? gate_up_bias, Tensor? down_bias, str activation, float limit, float alpha, "
    "bool keep_hidden) -> (Tensor y, Tensor gate_up_rows, Tensor row_order, "
    "Tensor inverse_order, Tensor expert_offsets)",
    reference=partial(_forward, partial(composition.forward, "reference")),
    native=partial(_forward, compiled.forward),
    triton=partial(_forward, _triton),
    parts=composition.PARTS,
    fused=True,
    fake=_fake,
    setup_context=_setup_context,
    num_outputs=1,
    backward=_backward,
    kernels=cuda_matmul.LAYER,
    proven=cuda_matmul.PROVEN,
)
