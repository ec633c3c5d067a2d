"""`grouped_mm_quantized` composed of `dequantize_weight` and `grouped_mm`."""

from __future__ import annotations

from torch import Tensor

from unimoe_kernels import _backends
from unimoe_kernels.quantization.rounding import dequantize_weight
from unimoe_kernels.quantization.weight import QuantizedWeight, assemble

PARTS = ("grouped_mm",)


def forward(
    backend: str,
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    expert_offsets: Tensor,
    bias: Tensor | None,
    format: str,
    transposed: bool,
) -> Tensor:
    """Multiplies the rows of each expert by its weight, dequantised to the dtype of `x`."""
    weight: QuantizedWeight = assemble(values, scales, zeros, format)
    floats = dequantize_weight(weight, x.dtype)
    floats = floats.transpose(1, 2) if transposed else floats
    return _backends.run(backend, "grouped_mm", x, floats, expert_offsets, bias)
