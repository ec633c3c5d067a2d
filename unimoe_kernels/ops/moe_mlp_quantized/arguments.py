"""The arguments of `moe_mlp_quantized` in its schema, and as the structures of `moe_mlp`."""

from __future__ import annotations

from torch import Tensor

from unimoe_kernels.ops.moe_mlp.arguments import ExpertWeights
from unimoe_kernels.quantization.weight import QuantizedWeight, assemble

# Both projections and their biases, as a schema has them.
WEIGHTS = (
    "Tensor gate_up_values, Tensor gate_up_scales, Tensor? gate_up_zeros, str gate_up_format, "
    "Tensor down_values, Tensor down_scales, Tensor? down_zeros, str down_format, "
    "Tensor? gate_up_bias, Tensor? down_bias"
)
NUM_WEIGHTS = WEIGHTS.count(",") + 1


def flatten(weights: ExpertWeights) -> tuple[Tensor | str | None, ...]:
    """Returns quantised weights and biases as `WEIGHTS` lists them."""
    return (*_parts(weights.first), *_parts(weights.down), weights.first_bias, weights.down_bias)


def unflatten(*flat: Tensor | str | None) -> ExpertWeights:
    """Undoes `flatten`."""
    return ExpertWeights(assemble(*flat[:4]), assemble(*flat[4:8]), *flat[8:])


def _parts(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor | None, str]:
    values, scales, zeros, format, _ = weight
    zeros = None if zeros is None else zeros.contiguous()
    return values.contiguous(), scales.contiguous(), zeros, format
