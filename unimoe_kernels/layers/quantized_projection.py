"""A module that holds a quantised stacked weight as buffers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from unimoe_kernels.layers._inputs import local_part
from unimoe_kernels.quantization.formats import FORMATS, SCALE_DTYPES
from unimoe_kernels.quantization.rounding import quantize_weight
from unimoe_kernels.quantization.weight import QuantizedWeight


class QuantizedProjection(nn.Module):
    """The frozen weight `[E, out, in]` of one projection of all experts.

    `.to(dtype)` converts only the scales, and only to float32 or bfloat16: float16 would round
    small scales to zero, and float64 adds no precision.

    Attributes:
        values: buffer; see `QuantizedWeight`.
        scales: buffer; see `QuantizedWeight`.
        zeros: buffer, or None without zero points.
        format: `"int8"` or `"int4"`.
        group_size: numbers of a row that share a scale.

    Args:
        weight: the quantised weight, which is not copied.
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
        """Creates a projection of shape `(E, out, in)`, all zeros, to load a state dict into.

        Raises:
            ValueError: See `quantize_weight`; `name` is the name of the weight in errors.
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
        """The buffers as an operator argument; the local shards if split between ranks."""
        values, scales = local_part(self.values), local_part(self.scales)
        return QuantizedWeight(values, scales, local_part(self.zeros), self.format, self.group_size)

    @property
    def shape(self) -> torch.Size:
        """`(E, out, in)`, with E counted over all ranks."""
        *leading, width = self.values.shape
        return torch.Size((*leading, width * FORMATS[self.format].numbers))

    @property
    def device(self) -> torch.device:
        """The device of the buffers."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the scales, and of LoRA parameters that are added."""
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
    """Returns the quantised projections of an experts module by name."""
    return {
        name: part
        for name, part in module.named_children()
        if isinstance(part, QuantizedProjection)
    }
