"""`grouped_mm_quantized`: multiplies each expert's rows by its quantised weight."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from unimoe_kernels import _backends, _checks
from unimoe_kernels.ops.grouped_mm_quantized import composition
from unimoe_kernels.quantization.weight import (
    QuantizedWeight,
    assemble,
    check_frozen,
    check_quantized,
)


def grouped_mm_quantized(
    x: Tensor,
    weight: QuantizedWeight,
    expert_offsets: Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """Multiplies each group of rows by the quantised weight of its expert.

    Equivalent to `grouped_mm` with the dequantised weight, without storing that weight as floats.
    The numbers of `"int8"` and `"int4"` are `scale * (integer - zero)`; see `QuantizedWeight`.

    Example:
        >>> weight = quantize_weight(torch.tensor([[[127.0, -1.0]], [[0.0, 254.0]]]), "int8")
        >>> x, offsets = torch.eye(2), torch.tensor([0, 1, 2], dtype=torch.int32)
        >>> grouped_mm_quantized(x, weight, offsets).flatten().tolist()
        [127.0, 254.0]

    Args:
        x: `[N, D]` in expert order, float16, bfloat16, float32 or float64, any strides.
        weight: `[E, F, D]`, on the device of `x`. It is frozen: no gradient is computed for it.
        expert_offsets: `[E + 1]`, int32, nondecreasing from 0, as returned by `expert_sort`.
        bias: `[E, F]`, dtype and device of `x`, or None.
        transposed: Whether to multiply by the transposed weight, as the gradient of `x` requires.
            `x` is then `[N, F]`, `bias` `[E, D]` and the result `[N, D]`.

    Returns:
        `[N, F]`, dtype of `x` (under `torch.autocast` that of torch's matmuls), contiguous; zeros
        from row `expert_offsets[E]` on.

    Raises:
        ValueError: If shapes do not match, devices differ, the format is unknown, or the scales
            require a gradient.
        TypeError: If a dtype is not one of those above, or not that of the format.

    Note:
        Differentiable in `x` and `bias`; deterministic. Products are summed in float32 (float64 for
        float64 `x`). With many rows, weights are rounded to the dtype of `x`.
    """
    x, bias = _checks.autocast(x, bias)
    if not isinstance(weight, QuantizedWeight):
        check_quantized("weight", weight)
    _check(x, *weight, expert_offsets, bias, transposed)
    check_frozen("weight", weight)
    values, scales, zeros, format, _ = weight
    return _backends.call(
        "grouped_mm_quantized",
        x.contiguous(),
        values.contiguous(),
        scales.contiguous(),
        None if zeros is None else zeros.contiguous(),
        expert_offsets,
        bias,
        format,
        transposed,
    )


@_checks.once_per_signature
def _check(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    format: str,
    group_size: int,
    expert_offsets: Tensor,
    bias: Tensor | None,
    transposed: bool,
) -> None:
    weight = QuantizedWeight(values, scales, zeros, format, group_size)
    _checks.check_tensor("x", x, "[N, F]" if transposed else "[N, D]")
    check_quantized("weight", weight)
    num_experts, *widths = weight.shape
    width, depth = reversed(widths) if transposed else widths
    if x.shape[1] != depth:
        raise ValueError(f"x (shape {tuple(x.shape)}) must have size {depth} in dimension 1")
    _checks.check_device("weight", values, "x", x)
    _checks.check_tensor("expert_offsets", expert_offsets, "[E + 1]", (_checks.INTEGERS[0],))
    _checks.check_size("expert_offsets", expert_offsets, 0, num_experts + 1, "E of weight plus 1")
    _checks.check_device("expert_offsets", expert_offsets, "x", x)
    if bias is not None:
        _checks.check_tensor("bias", bias, "[E, D]" if transposed else "[E, F]")
        _checks.check_size("bias", bias, 0, num_experts, "E of weight")
        _checks.check_size("bias", bias, 1, width, "width of the result")
        _checks.check_same("bias", bias, "x", x)


def _fake(x, values, scales, zeros, expert_offsets, bias, format, transposed):
    _, width, depth = assemble(values, scales, zeros, format).shape
    return x.new_empty((x.shape[0], depth if transposed else width))


def _setup_context(ctx, inputs, output):
    _, *weight, expert_offsets, _, ctx.format, ctx.transposed = inputs
    ctx.save_for_backward(*weight, expert_offsets)


def _backward(backend, ctx, grad):
    *weight, expert_offsets = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        turned = (expert_offsets, None, ctx.format, not ctx.transposed)
        grad_x = _backends.run(backend, "grouped_mm_quantized", grad, *weight, *turned)
    if ctx.needs_input_grad[5]:
        # Only the sum over rows is needed, which a weight gradient without columns provides.
        no_columns = grad.new_empty((grad.shape[0], 0))
        _, grad_bias = _backends.run(
            backend, "grouped_mm_wgrad", grad, no_columns, expert_offsets, True
        )
    return grad_x, None, None, None, None, grad_bias, None, None


def _triton(x, values, scales, zeros, expert_offsets, bias, format, transposed):
    from unimoe_kernels.ops.grouped_mm_quantized import kernel

    return kernel.grouped_mm_quantized(x, values, scales, zeros, expert_offsets, bias, transposed)


_backends.declare(
    "grouped_mm_quantized",
    "(Tensor x, Tensor values, Tensor scales, Tensor? zeros, Tensor expert_offsets, Tensor? bias, "
    "str format, bool transposed) -> Tensor",
    reference=partial(composition.forward, "reference"),
    native=partial(composition.forward, "default"),
    triton=_triton,
    parts=composition.PARTS,
    fused=True,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
