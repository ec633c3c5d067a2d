"""Conversion between the schema arguments of `moe_mlp_quantized` and structures of `moe_mlp`."""

from __future__ import annotations

from torch import Tensor

from unimoe_kernels.ops.moe_mlp.arguments import ExpertWeights
from unimoe_kernels.quantization.weight import QuantizedWeight, assemble

# Both projections and their biases in the schema.
WEIGHTS = (
    "Tensor gate_up_values, Tensor gate_up_scales, Tensor? gate_up_zeros, str gate_up_format, "
    "Tensor down_values, Tensor down_scales, Tensor? down_zeros, str down_format, "
    "Tensor? gate_up_bias, Tensor? down_bias"
)
NUM_WEIGHTS = WEIGHTS.count(",") + 1


def flatten(weights: ExpertWeights) -> tuple[Tensor | str | None, ...]:
    """Returns the tensors and formats of weights and biases in the order of `WEIGHTS`."""
    return (*_parts(weights.first), *_parts(weights.down), weights.first_bias, weights.down_bias)


def unflatten(*flat: Tensor | str | None) -> ExpertWeights:
    """Inverse of `flatten`."""
    return ExpertWeights(assemble(*flat[:4]), assemble(*flat[4:8]), *flat[8:])


def _parts(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor | None, str]:
    values, scales, zeros, format, _ = weight
    zeros = None if zeros is None else zeros.contiguous()
    return values.contiguous(), scales.contiguous(), zeros, format
