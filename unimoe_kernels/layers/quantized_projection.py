"""A stacked weight in a quantised format, as a module that holds its parts as buffers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from unimoe_kernels.layers._inputs import local_part
from unimoe_kernels.quantization.formats import FORMATS, SCALE_DTYPES
from unimoe_kernels.quantization.rounding import quantize_weight
from unimoe_kernels.quantization.weight import QuantizedWeight


class QuantizedProjection(nn.Module):
    """The weight `[E, out, in]` of one projection of all experts, frozen.

    Conversions to another dtype move the scales alone, to float32 or bfloat16: float16 would round
    small ones to zero, and float64 adds nothing.

    Attributes:
        values: buffer, see `QuantizedWeight`.
        scales: buffer.
        zeros: buffer, or None without zero points.
        format: `"int8"` or `"int4"`.
        group_size: numbers of a row that share a scale.

    Args:
        weight: what to hold, without a copy.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.register_buffer("values", weight.values)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zeros", weight.zeros)
        self.format, self.group_size = weight.format, weight.group_size

    @classmethod
    def zero(
        cls,
        shape: tuple[int, int, int],
        format: str,
        group_size: int | None = None,
        *,
        zero_points: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        name: str = "weight",
    ) -> QuantizedProjection:
        """Makes one of a shape `(E, out, in)`, all zero, to be filled from a state dict.

        Raises:
            ValueError: As `quantize_weight`; name is what its errors call the weight.
        """
        dtype = dtype or torch.get_default_dtype()
        floats = torch.empty(shape, device="meta", dtype=dtype)
        weight = quantize_weight(floats, format, group_size, zero_points=zero_points, name=name)
        device = device or torch.get_default_device()
        zeros = weight.zeros
        return cls(
            weight._replace(
                values=torch.zeros_like(weight.values, device=device),
                scales=torch.zeros_like(weight.scales, device=device),
                zeros=None if zeros is None else torch.zeros_like(zeros, device=device),
            )
        )

    @property
    def weight(self) -> QuantizedWeight:
        """The buffers as operators take them: of those split between ranks, what is held here."""
        parts = map(local_part, (self.values, self.scales, self.zeros))
        return QuantizedWeight(*parts, self.format, self.group_size)

    @property
    def shape(self) -> torch.Size:
        """`(E, out, in)`, of all ranks."""
        *leading, width = self.values.shape
        return torch.Size((*leading, width * FORMATS[self.format].numbers))

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the scales, in which LoRA is made."""
        return self.scales.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedProjection:
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype not in SCALE_DTYPES:
            kept = scales.to(self.scales.device)
            if kept.dtype not in SCALE_DTYPES:
                kept = kept.float()
            self.scales = kept
        return self

    def extra_repr(self) -> str:
        """What print(module) shows between the parentheses."""
        options = f"format={self.format!r}, group_size={self.group_size}"
        return f"{tuple(self.shape)}, {options}, zero_points={self.zeros is not None}"


def quantized_parts(module: nn.Module) -> dict[str, QuantizedProjection]:
    """The quantised projections that a module of experts holds, by name."""
    return {
        name: part
        for name, part in module.named_children()
        if isinstance(part, QuantizedProjection)
    }
