"""Quantisation and dequantisation of weights: the specification that kernels are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from unimoe_kernels import _checks
from unimoe_kernels.quantization.formats import FORMATS, INT4_OFFSET, check_options, group_of
from unimoe_kernels.quantization.weight import QuantizedWeight


def quantize_weight(
    weight: Tensor,
    format: str,
    group_size: int | None = None,
    *,
    zero_points: bool = False,
    name: str = "weight",
) -> QuantizedWeight:
    """Quantises a stacked weight by rounding to nearest.

    The scale of a group follows from its largest magnitude. For `"int8"` it is `max|w| / 127`. For
    `"int4"` it is `-w / 8`, where w is the number of largest magnitude, which becomes -8: this uses
    one more of the 16 integers than `max|w| / 7`, and the error is 12 % lower. With zero points it
    is `(max(w) - min(w)) / 15`, where the range is extended to include zero. Numbers are rounded to
    multiples of the stored scale.

    Example:
        >>> weight = torch.tensor([[[-8.0, 7.0, 0.4, 3.0] * 16]])
        >>> dequantize_weight(quantize_weight(weight, "int4", 64)).flatten()[:4].tolist()
        [-8.0, 7.0, 0.0, 3.0]

    Args:
        weight: `[E, out, in]`, float16, bfloat16, float32 or float64.
        format: `"int8"` or `"int4"`.
        group_size: numbers of a row that share a scale: 32, 64 or 128. None is one scale per output
            row for `"int8"` and 64 for `"int4"`.
        zero_points: whether groups have zero points; `"int4"` only.
        name: name of the weight in errors.

    Returns:
        The quantised weight, in new memory. Scales are float32 for float32 and float64 weights, and
        bfloat16 otherwise.

    Raises:
        ValueError: If the format is unknown, `in` is not a multiple of the group size, or `weight`
            contains NaN or infinity.
        TypeError: If `weight` is already quantised or not a floating-point tensor.
    """
    check_options(format, group_size, zero_points)
    if isinstance(weight, QuantizedWeight):
        raise TypeError(f"{name} is quantised already ({weight.format}), it must be a float tensor")
    _checks.check_tensor(name, weight, "[E, out, in]")
    _checks.refuse_sharded(name, weight)
    _checks.check_positive(f"in of {name}", weight.shape[2])
    group = group_of(format, group_size, weight.shape[2], name)
    check_finite(name, weight)
    found, weight = FORMATS[format], weight.detach()
    num_experts, rows, width = weight.shape
    groups = width // group
    wide = weight.dtype in (torch.float32, torch.float64)
    like = {"device": weight.device}
    scales = torch.empty(
        num_experts, rows, groups, dtype=torch.float32 if wide else torch.bfloat16, **like
    )
    zeros = torch.empty(scales.shape, dtype=torch.uint8, **like) if zero_points else None
    values = torch.empty(num_experts, rows, width // found.numbers, dtype=found.dtype, **like)
    # One expert at a time: besides the result, memory holds only a few copies of one expert.
    for e, weight_OI in enumerate(weight):
        exact = weight_OI.to(_checks.accumulation_dtype(weight.dtype))
        grouped_OGI = exact.reshape(rows, groups, group)
        scale_OG, zero_OG = _scales(grouped_OGI, format, zero_points, scales.dtype)
        scales[e] = scale_OG
        integers_OGI = round_to_scales(grouped_OGI, scale_OG, zero_OG, format)
        if zeros is not None:
            zeros[e] = zero_OG
        integers_OI = integers_OGI.reshape(rows, width).to(found.dtype)
        values[e] = pack_int4(integers_OI) if format == "int4" else integers_OI
    return QuantizedWeight(values, scales, zeros, format, group)


def dequantize_weight(weight: QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the numbers that a quantised weight represents.

    They are computed in float32 (float64 if `dtype` is float64) and rounded once to `dtype`.

    Args:
        weight: `[E, out, in]`.
        dtype: dtype of the result; None for that of the scales.

    Returns:
        `[E, out, in]`.

    Raises:
        TypeError: If `weight` is not quantised, or `dtype` is not a floating-point dtype.
    """
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"weight ({type(weight).__name__}) must be a QuantizedWeight")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype ({dtype}) must be a floating-point dtype")
    dtype = dtype or weight.scales.dtype
    wide = _checks.accumulation_dtype(dtype)
    zeros = INT4_OFFSET if weight.format == "int4" else 0
    integers = unpack_int4(weight.values) if weight.format == "int4" else weight.values
    if weight.zeros is not None:
        zeros = weight.zeros.unsqueeze(-1).to(wide)
    groups = integers.to(wide).unflatten(-1, (weight.scales.shape[-1], weight.group_size)) - zeros
    return (groups * weight.scales.unsqueeze(-1).to(wide)).flatten(-2).to(dtype)


def pack_int4(integers: Tensor) -> Tensor:
    """Packs integers from 0 to 15, uint8 `[..., n]`, into bytes `[..., n / 2]`, low bits first."""
    return integers[..., ::2] | integers[..., 1::2] << 4


def unpack_int4(values: Tensor) -> Tensor:
    """Inverse of `pack_int4`."""
    return torch.stack((values & 15, values >> 4), -1).flatten(-2)


def check_finite(name: str, weight: Tensor) -> None:
    """Raises ValueError naming the first expert whose weight contains NaN or infinity."""
    if weight.is_meta:
        return
    for e, own in enumerate(weight):
        # Scales are at most float32, so a float64 weight must be finite in float32.
        own = own.float() if own.dtype == torch.float64 else own
        if not own.isfinite().all():
            found = "NaN" if own.isnan().any() else "infinity"
            raise ValueError(f"{name} holds {found} in expert {e}, it must be finite")


def _scales(
    grouped: Tensor, format: str, zero_points: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | int]:
    """Returns the scales `[out, groups]`, in their stored dtype, and the zero points."""
    if format == "int8":
        return (grouped.abs().amax(-1) / FORMATS["int8"].highest).to(dtype), 0
    if not zero_points:
        index = grouped.abs().argmax(-1, keepdim=True)
        return (grouped.gather(-1, index).squeeze(-1) / FORMATS["int4"].lowest).to(
            dtype
        ), INT4_OFFSET
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = (high / 15 - low / 15).to(dtype)
    zero = (-low / _divisor(scale, grouped.dtype)).round().clamp(0, 15)
    return scale, zero


def round_to_scales(
    grouped: Tensor, scale: Tensor, zero: Tensor | int | None, format: str
) -> Tensor:
    """Rounds numbers to the nearest multiples of given scales.

    Args:
        grouped: `[..., group]`.
        scale: `[...]`, in the stored dtype.
        zero: `[...]` zero points, or None for the fixed zero point of the format.
        format: name of a format.

    Returns:
        The stored integers, in the dtype of `grouped`.
    """
    found = FORMATS[format]
    zero = INT4_OFFSET if zero is None else zero
    integers = (grouped / _divisor(scale, grouped.dtype).unsqueeze(-1)).round()
    if format == "int8":
        return integers.clamp(found.lowest, found.highest)
    zero = zero.unsqueeze(-1) if isinstance(zero, Tensor) else zero
    return (integers + zero).clamp(0, found.highest - found.lowest)


def _divisor(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the scales, with 1 in place of 0 for groups of zeros."""
    return scale.to(dtype).masked_fill(scale == 0, 1)
