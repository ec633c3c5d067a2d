"""`moe_mlp`: the experts of a layer as one operator that keeps little for its backward."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from unimoe_kernels import _backends, _checks
from unimoe_kernels.ops.moe_mlp import composition, packed
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

    Example: with one expert, `ids` all zero and `scores` all one this is the FFN
    `swiglu(x @ gate_up_proj[0].T) @ down_proj[0].T`.

    Args:
        x: `[T, D]`, float16, bfloat16, float32 or float64, any strides.
        gate_up_proj: `[E, 2F, D]`, gate rows first, dtype and device of `x`.
        down_proj: `[E, D, F]`, likewise.
        ids: `[T, K]`, int32 or int64. A value of E or more drops this choice, as of another rank or
            of none: it adds 0.
        scores: `[T, K]`, any floating dtype, used in float32 (float64 for float64 `x`).
        activation: As in `swiglu`, with its `limit` and `alpha`.
        gate_up_bias: `[E, 2F]` or None.
        down_bias: `[E, D]` or None.
        limit: Clamp of `"swiglu_clamped"`.
        alpha: Slope of `"swiglu_clamped"`.

    Returns:
        `[T, D]`, dtype of `x` (under `torch.autocast` that of torch's matmuls), contiguous.

    Raises:
        ValueError: If shapes do not fit each other, devices differ or `activation` is unknown. With
            `UNIMOE_CHECKS=1` also if an id is negative (otherwise it is dropped, too).
        TypeError: If dtypes differ or are none of those above.

    Note:
        Differentiable in everything but `ids`; deterministic. Keeps for the backward `x`, the
        pre-activations `[N, 2F]`, the scores, two int32 orders `[N]` and the offsets.
    """
    x, gate_up_proj, down_proj, gate_up_bias, down_bias = _checks.autocast(
        x, gate_up_proj, down_proj, gate_up_bias, down_bias
    )
    _check(x, gate_up_proj, down_proj, ids, scores, activation, gate_up_bias, down_bias)
    differentiable = (x, gate_up_proj, down_proj, scores, gate_up_bias, down_bias)
    keep_hidden = _backends.is_recorded(*differentiable)
    x, ids = x.contiguous(), _checks.narrow_ids(ids, gate_up_proj.shape[0]).contiguous()
    scores = scores.to(_checks.accumulation_dtype(x.dtype)).contiguous()
    weights = (gate_up_proj, down_proj)
    options = (ids, scores, gate_up_bias, down_bias, activation, limit, alpha)
    if not keep_hidden and not torch.compiler.is_compiling():
        panels = packed.panels_of(*weights)
        if panels is not None and _backends.backend_of("moe_mlp", x) == "cpp":
            return torch.ops.unimoe.moe_mlp_packed(x, *weights, *panels, *options)
    return _backends.call("moe_mlp", x, *weights, *options, keep_hidden)[0]


def _check(x, gate_up_proj, down_proj, ids, scores, activation, gate_up_bias, down_bias):
    _checks.check_tensor("x", x, "[T, D]")
    _checks.check_tensor("gate_up_proj", gate_up_proj, "[E, 2F, D]")
    num_experts, double_width, _ = gate_up_proj.shape
    _checks.check_positive("E of gate_up_proj", num_experts)
    if double_width % 2:
        shape = tuple(gate_up_proj.shape)
        raise ValueError(f"gate_up_proj (shape {shape}) must have an even size in dimension 1")
    _checks.check_size("gate_up_proj", gate_up_proj, 2, x.shape[1], "D of x")
    _checks.check_same("gate_up_proj", gate_up_proj, "x", x)
    _checks.check_tensor("down_proj", down_proj, "[E, D, F]")
    _checks.check_size("down_proj", down_proj, 0, num_experts, "E of gate_up_proj")
    _checks.check_size("down_proj", down_proj, 1, x.shape[1], "D of x")
    _checks.check_size("down_proj", down_proj, 2, double_width // 2, "F of gate_up_proj")
    _checks.check_same("down_proj", down_proj, "x", x)
    _checks.check_tensor("ids", ids, "[T, K]", _checks.INTEGERS)
    _checks.check_size("ids", ids, 0, x.shape[0], "T of x")
    _checks.check_positive("K of ids", ids.shape[1])
    _checks.check_device("ids", ids, "x", x)
    _checks.check_tensor("scores", scores, "[T, K]")
    _checks.check_size("scores", scores, 0, x.shape[0], "T of x")
    _checks.check_size("scores", scores, 1, ids.shape[1], "K of ids")
    _checks.check_device("scores", scores, "x", x)
    _checks.check_choice("activation", activation, ACTIVATIONS)
    for name, bias, width in (
        ("gate_up_bias", gate_up_bias, double_width),
        ("down_bias", down_bias, x.shape[1]),
    ):
        if bias is not None:
            _checks.check_tensor(name, bias, "[E, 2F]" if name == "gate_up_bias" else "[E, D]")
            _checks.check_size(name, bias, 0, num_experts, "E of gate_up_proj")
            _checks.check_size(name, bias, 1, width, "width of its projection")
            _checks.check_same(name, bias, "x", x)


def _fake(
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
    num_experts, double_width, _ = gate_up_proj.shape
    num_rows = ids.shape[0] * ids.shape[1]
    return (
        x.new_empty(x.shape),
        x.new_empty((num_rows if keep_hidden else 0, double_width)),
        ids.new_empty((num_rows,)),
        ids.new_empty((num_rows,)),
        ids.new_empty((num_experts + 1,)),
    )


def _setup_context(ctx, inputs, output):
    x, gate_up_proj, down_proj, _, scores, gate_up_bias, down_bias, *ctx.gate, _ = inputs
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gate_up_proj, down_proj, scores, *saved, down_bias, gate_up_bias)


def _backward(backend, ctx, grad, *_):
    if grad is None:
        return (None,) * 11
    n = ctx.needs_input_grad
    needs = [n[0], n[1], n[2], n[4], n[5], n[6]]
    *saved, gate_up_bias = ctx.saved_tensors
    backward = partial(_backends.run, backend, "moe_mlp_backward")
    if _backends.is_recorded(grad, *saved, gate_up_bias):
        # Nothing tells of the pre-activations that were kept what they depend on.
        x, gate_up_proj, _, scores, _, row_order, _, offsets, _ = saved
        saved[4] = composition.pre_activations(
            backend, x, gate_up_proj, gate_up_bias, row_order, offsets, scores.shape[1]
        )
        backward = partial(composition.backward, backend)
    grads = backward(grad.contiguous(), *saved, *ctx.gate, needs)
    x, gate_up, down, scores, gate_up_bias, down_bias = (
        grad if needed else None for grad, needed in zip(grads, needs, strict=True)
    )
    return x, gate_up, down, None, scores, gate_up_bias, down_bias, None, None, None, None


def _backward_fake(
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
    needs_x, needs_gate_up, needs_down, needs_scores, needs_gate_up_bias, needs_down_bias = needs
    num_experts, double_width, width = gate_up_proj.shape
    empty = (0,)
    return (
        x.new_empty(x.shape if needs_x else empty),
        x.new_empty(gate_up_proj.shape if needs_gate_up or needs_gate_up_bias else empty),
        x.new_empty(down_proj.shape if needs_down or needs_down_bias else empty),
        scores.new_empty(scores.shape) if needs_scores else x.new_empty(empty),
        x.new_empty((num_experts, double_width) if needs_gate_up_bias else empty),
        x.new_empty((num_experts, width) if needs_down_bias else empty),
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
    reference=partial(composition.backward, "reference"),
    native=partial(composition.backward, "default"),
    triton=_backward_triton,
    parts=composition.PARTS,
    fused=True,
    fake=_backward_fake,
    public=False,
)
_backends.declare(
    "moe_mlp",
    "(Tensor x, Tensor gate_up_proj, Tensor down_proj, Tensor ids, Tensor scores, "
    "Tensor? gate_up_bias, Tensor? down_bias, str activation, float limit, float alpha, "
    "bool keep_hidden) -> (Tensor y, Tensor gate_up_rows, Tensor row_order, "
    "Tensor inverse_order, Tensor expert_offsets)",
    reference=partial(composition.forward, "reference"),
    native=partial(composition.forward, "default"),
    triton=_triton,
    parts=composition.PARTS,
    fused=True,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
