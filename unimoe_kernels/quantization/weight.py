"""`QuantizedWeight`: the tensors of a stacked weight in a quantised format."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unimoe_kernels import _checks
from unimoe_kernels.quantization.formats import FORMATS, GROUP_SIZES, SCALE_DTYPES, format_of


class QuantizedWeight(NamedTuple):
    """A stacked weight `[E, out, in]` in a quantised format.

    Number i of an output row is `scale * (integer - zero)`, with the scale and zero point of group
    `i // group_size`. The first dimension of every tensor is E; tensors can be sharded along it.

    Attributes:
        values: the integers. `"int8"`: `[E, out, in]` int8, from -127 to 127. `"int4"`:
            `[E, out, in / 2]` uint8, two integers from 0 to 15 per byte: byte j of a row holds
            number 2j in its low four bits and number 2j + 1 in its high four bits.
        scales: `[E, out, in / group_size]`, float32 or bfloat16; may be negative.
        zeros: `[E, out, in / group_size]` uint8 zero points from 0 to 15, or None. If None, the
            zero point of `"int4"` is 8 and that of `"int8"` is 0.
        format: `"int8"` or `"int4"`.
        group_size: numbers of a row that share a scale: 32, 64, 128 or, for `"int8"`, the whole
            row.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    format: str
    group_size: int

    @property
    def shape(self) -> torch.Size:
        """`(E, out, in)`."""
        *leading, width = self.values.shape
        return torch.Size((*leading, width * FORMATS[self.format].numbers))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(
            part.nbytes for part in (self.values, self.scales, self.zeros) if part is not None
        )

    def of_experts(self, first: int, end: int) -> QuantizedWeight:
        """Returns the weights of experts `first` to `end - 1`, as views."""
        zeros = None if self.zeros is None else self.zeros[first:end]
        return self._replace(
            values=self.values[first:end], scales=self.scales[first:end], zeros=zeros
        )


def check_quantized(name: str, weight: QuantizedWeight) -> None:
    """Checks that the tensors of a quantised weight are consistent.

    Raises:
        ValueError: If the format is unknown, or shapes or devices do not match.
        TypeError: If `weight` is not a `QuantizedWeight`, or a dtype is not that of the format.
    """
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"{name} ({type(weight).__name__}) must be a QuantizedWeight")
    found = format_of(weight.format)
    _checks.check_tensor(f"{name}.values", weight.values, "[E, out, in]", (found.dtype,))
    _checks.check_tensor(f"{name}.scales", weight.scales, "[E, out, groups]", SCALE_DTYPES)
    width, group_size = weight.shape[2], weight.group_size
    _checks.check_positive(f"in of {name}", width)
    if not (group_size in GROUP_SIZES or (found.rows and group_size == width)):
        raise ValueError(f"{name}.group_size ({group_size}) must be one of {GROUP_SIZES}")
    if width % group_size:
        raise ValueError(
            f"{name} has rows of {width} numbers, which must be a multiple of group_size "
            f"({group_size})"
        )
    expected = (*weight.shape[:2], width // group_size)
    parts = {"scales": weight.scales}
    if weight.zeros is not None:
        if not found.zero_points:
            raise ValueError(f"{name}.zeros must be None with format {weight.format!r}")
        _checks.check_tensor(f"{name}.zeros", weight.zeros, "[E, out, groups]", (torch.uint8,))
        parts["zeros"] = weight.zeros
    for part, tensor in parts.items():
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name}.{part} (shape {tuple(tensor.shape)}) must be {expected}")
        _checks.check_device(f"{name}.{part}", tensor, f"{name}.values", weight.values)


def check_frozen(name: str, weight: QuantizedWeight) -> None:
    """Raises ValueError if the scales require a gradient: no operator computes one."""
    if weight.scales.requires_grad:
        raise ValueError(f"{name}.scales must not require gradients: quantised weights are frozen")


def assemble(values: Tensor, scales: Tensor, zeros: Tensor | None, format: str) -> QuantizedWeight:
    """Builds a quantised weight from its tensors; their shapes determine the group size."""
    width = values.shape[2] * FORMATS[format].numbers
    return QuantizedWeight(values, scales, zeros, format, width // scales.shape[2])
