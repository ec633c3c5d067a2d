"""`moe_mlp_quantized`: the experts of a layer with quantised weights, as one operator."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from unimoe_kernels import _backends, _checks
from unimoe_kernels.ops.moe_mlp.arguments import ExpertWeights, Gate, Rows
from unimoe_kernels.ops.moe_mlp.checks import check_quantized_experts
from unimoe_kernels.ops.moe_mlp_quantized import composition
from unimoe_kernels.ops.moe_mlp_quantized.arguments import NUM_WEIGHTS, WEIGHTS, flatten, unflatten
from unimoe_kernels.ops.swiglu.op import ACTIVATIONS
from unimoe_kernels.quantization.weight import QuantizedWeight


def moe_mlp_quantized(
    x: Tensor,
    gate_up_proj: QuantizedWeight,
    down_proj: QuantizedWeight,
    ids: Tensor,
    scores: Tensor,
    *,
    activation: str = "silu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    limit: float = 7.0,
    alpha: float = 1.702,
) -> Tensor:
    """Runs each token through its K quantised experts and sums the results, weighted by score.

    Equivalent to `moe_mlp` with the dequantised weights, without storing those weights as floats.

    Example:
        >>> x, scores = torch.randn(3, 64), torch.ones(3, 1)
        >>> ids = torch.zeros(3, 1, dtype=torch.int32)
        >>> first = quantize_weight(torch.randn(1, 256, 64) / 8, "int4")
        >>> down = quantize_weight(torch.randn(1, 64, 128) / 8, "int4")
        >>> y = moe_mlp_quantized(x, first, down, ids, scores)
        >>> same = moe_mlp(x, dequantize_weight(first), dequantize_weight(down), ids, scores)
        >>> torch.allclose(y, same, atol=1e-4)
        True

    Args:
        x: `[T, D]`, float16, bfloat16, float32 or float64, any strides.
        gate_up_proj: `[E, 2F, D]`, gate rows first, device of `x`. Frozen: it has no gradient.
        down_proj: `[E, D, F]`, likewise; may have another format.
        ids: `[T, K]`, int32 or int64. A value of E or more drops this choice, which then adds 0.
        scores: `[T, K]`, any floating dtype, used in float32 (float64 for float64 `x`).
        activation: See `swiglu`, as for `limit` and `alpha`.
        gate_up_bias: `[E, 2F]`, dtype of `x`, or None.
        down_bias: `[E, D]`, likewise.
        limit: Clamp of `"swiglu_clamped"`.
        alpha: Slope of `"swiglu_clamped"`.

    Returns:
        `[T, D]`, dtype of `x` (under `torch.autocast` that of torch's matmuls), contiguous.

    Raises:
        ValueError: If shapes do not match, devices differ, `activation` or a format is unknown, or
            scales require a gradient. With `UNIMOE_CHECKS=1` also if an id is negative.
        TypeError: If dtypes differ or are not among those above, or a weight is not quantised.

    Note:
        Differentiable in `x`, `scores` and the biases; deterministic. Saves the same tensors for
        the backward as `moe_mlp`. With many rows, weights are rounded to the dtype of `x`.
    """
    x, *biases = _checks.autocast(x, gate_up_bias, down_bias)
    weights = ExpertWeights(gate_up_proj, down_proj, *biases)
    check_quantized_experts(x, ids, scores, weights)
    _checks.check_choice("activation", activation, ACTIVATIONS)
    _checks.check_ids(ids)
    scores = scores.to(_checks.accumulation_dtype(x.dtype)).contiguous()
    gate = Gate(activation, limit, alpha)
    keep_hidden = _backends.is_recorded(x, scores, *biases)
    arguments = (x.contiguous(), ids.contiguous(), scores, *flatten(weights), *gate, keep_hidden)
    return _backends.call("moe_mlp_quantized", *arguments)[0]


def _fake(x, ids, scores, *flat):
    num_experts, double_width, _ = unflatten(*flat[:NUM_WEIGHTS]).first.shape
    num_rows = ids.shape[0] * ids.shape[1]
    return (
        x.new_empty(x.shape),
        x.new_empty((num_rows if flat[-1] else 0, double_width)),
        ids.new_empty((num_rows,), dtype=torch.int32),
        ids.new_empty((num_rows,), dtype=torch.int32),
        ids.new_empty((num_experts + 1,), dtype=torch.int32),
    )


def _setup_context(ctx, inputs, output):
    x, _, scores, *flat = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    flat, ctx.gate = flat[:NUM_WEIGHTS], Gate(*flat[NUM_WEIGHTS:-1])
    ctx.formats = [one if isinstance(one, str) else None for one in flat]
    tensors = [None if isinstance(one, str) else one for one in flat]
    ctx.save_for_backward(x, scores, *kept, *tensors)


def _backward(backend, ctx, grad, *_):
    result = [None] * (3 + NUM_WEIGHTS + len(ctx.gate) + 1)
    if grad is None:
        return tuple(result)
    x, scores, hidden, *others = ctx.saved_tensors
    rows, tensors = Rows(*others[:3]), others[3:]
    flat = [one or two for one, two in zip(ctx.formats, tensors, strict=True)]
    places = (0, 2, 3 + NUM_WEIGHTS - 2, 3 + NUM_WEIGHTS - 1)
    needs = [ctx.needs_input_grad[place] for place in places]
    grad = grad.contiguous()
    if _backends.is_recorded(grad, x, scores, *flat[-2:], hidden):
        weights = unflatten(*flat)
        grads = composition.recorded_gradients(
            backend, grad, x, scores, weights, rows, ctx.gate, needs
        )
    else:
        saved = (x, scores, hidden, *rows, *flat)
        grads = _backends.run(backend, "moe_mlp_quantized_backward", grad, *saved, *ctx.gate, needs)
    for place, needed, found in zip(places, needs, grads, strict=True):
        result[place] = found if needed else None
    return tuple(result)


def _backward_fake(grad, x, scores, hidden, row_order, inverse_order, expert_offsets, *flat):
    num_experts, double_width, width = unflatten(*flat[:NUM_WEIGHTS]).first.shape
    needs_x, needs_scores, needs_first_bias, needs_down_bias = flat[-1]
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        scores.new_empty(scores.shape) if needs_scores else x.new_empty((0,)),
        x.new_empty((num_experts, double_width) if needs_first_bias else (0,)),
        x.new_empty((num_experts, width) if needs_down_bias else (0,)),
    )


def _triton(*args):
    from unimoe_kernels.ops.moe_mlp_quantized import fused

    return fused.forward(*args)


_backends.declare(
    "moe_mlp_quantized_backward",
    "(Tensor grad, Tensor x, Tensor scores, Tensor gate_up_rows, Tensor row_order, "
    f"Tensor inverse_order, Tensor expert_offsets, {WEIGHTS}, str activation, float limit, "
    "float alpha, bool[] needs) -> (Tensor grad_x, Tensor grad_scores, Tensor grad_gate_up_bias, "
    "Tensor grad_down_bias)",
    reference=partial(composition.backward, "reference"),
    native=partial(composition.backward, "default"),
    triton=partial(composition.backward, "triton"),
    parts=composition.PARTS,
    fake=_backward_fake,
    public=False,
)
_backends.declare(
    "moe_mlp_quantized",
    f"(Tensor x, Tensor ids, Tensor scores, {WEIGHTS}, str activation, float limit, float alpha, "
    "bool keep_hidden) -> (Tensor y, Tensor gate_up_rows, Tensor row_order, Tensor inverse_order, "
    "Tensor expert_offsets)",
    reference=partial(composition.forward, "reference"),
    native=partial(composition.forward, "default"),
    triton=_triton,
    parts=composition.PARTS,
    fused=True,
    fake=_fake,
    setup_context=_setup_context,
    num_outputs=1,
    backward=_backward,
)
