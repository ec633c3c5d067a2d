"""Quantises the experts of whole models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from unimoe_kernels import _checks
from unimoe_kernels.integrations.calibration import Calibration, evaluating
from unimoe_kernels.integrations.model_experts import all_experts, innermost
from unimoe_kernels.integrations.transformers import register_with_transformers
from unimoe_kernels.layers import GroupedExperts, QuantizedExperts
from unimoe_kernels.layers.quantized_experts import quantize_in_place
from unimoe_kernels.layers.quantized_projection import quantized_parts
from unimoe_kernels.quantization.formats import check_options, group_of
from unimoe_kernels.quantization.rounding import check_finite
from unimoe_kernels.quantization.weight import QuantizedWeight

# The key of a configuration that transformers reads before it loads a folder. A record without
# `quant_method` makes it raise; with an unknown one it would only warn, and draw the experts anew.
RECORD = "quantization_config"
METHOD = "unimoe"


@torch.no_grad()
def quantize_experts(
    model: nn.Module,
    format: str = "int4",
    group_size: int | None = None,
    *,
    zero_points: bool = False,
    calibration: Iterable[Any] | None = None,
) -> nn.Module:
    """Rounds the weights of all experts of a model to few bits, one stacked weight after the other.

    What is held at any time is the model and one quantised weight more; each float weight is given
    up when it is rounded. The experts compute on from the quantised weights, which are frozen. LoRA
    on top trains (`add_expert_lora`, `GroupedExperts.add_lora`). Everything else of the model, such
    as attention and routers, stays as it is.

    Serves `GroupedExperts`, itself or in `MoE` and whole models, and models of transformers whose
    experts implementation can be chosen (`"unimoe"` is chosen here and has to stay). A model of
    transformers is saved by its `save_pretrained` and comes back with `load_quantized`.

    Example:
        >>> moe = quantize_experts(MoE(64, 128, num_experts=4, top_k=2), "int4", group_size=64)
        >>> moe.experts.gate_up_proj
        QuantizedProjection((4, 256, 64), format='int4', group_size=64, zero_points=False)

    Args:
        model: changed in place; before it is compiled, sharded or split between ranks.
        format: `"int8"` or `"int4"`.
        group_size: numbers along the sum that share a scale, 32, 64 or 128; None is one scale an
            output row for `"int8"` and 64 for `"int4"`.
        zero_points: whether groups have zero points besides, for `"int4"`.
        calibration: None to round to nearest, or inputs of the model, a few hundred tokens or more:
            mappings of keyword arguments, tuples of positional ones, or single arguments. Weights
            are then rounded so that the outputs of each expert on the rows routed to it change
            least (GPTQ, arXiv 2210.17323), layer by layer, each behind the quantised layers before
            it. Experts that see fewer than 16 rows are rounded to nearest, and named in a warning.
            Formats and speed of the result are the same.

    Returns:
        The same model.

    Raises:
        ValueError: If the model has no experts, the format is unknown, a width is no multiple of
            the group, weights hold NaN or infinity, or are sharded; if calibration is empty or
            gives NaN or infinity in a layer of experts. Nothing is changed then.
        TypeError: If experts are of a subclass of `GroupedExperts`.
        RuntimeError: If experts are quantised already, or LoRA is merged into their weights.
    """
    check_options(format, group_size, zero_points)
    found = all_experts(model)
    for name, experts in found:
        check_quantizable(name, experts, format, group_size)
        for key in projections(experts):
            check_finite(f"{name}.{key}", experts.get_parameter(key))
    foreign = [experts for _, experts in found if not isinstance(experts, GroupedExperts)]
    if foreign:
        register_with_transformers()
        before = foreign[0].config._experts_implementation
        innermost(model).set_experts_implementation(METHOD)
    options = (format, group_size, zero_points)
    if calibration is not None:
        with evaluating(model):
            try:
                calibrated = Calibration(model, found, calibration)
            except BaseException:
                if foreign:
                    innermost(model).set_experts_implementation(before)
                raise
            _convert_calibrated(calibrated, options)
        calibrated.warn()
    for _, experts in found:
        if not quantized_parts(experts):
            convert(experts, *options)
    mark(model, format, group_size, zero_points)
    return model


def check_quantizable(name: str, experts: nn.Module, format: str, group_size: int | None) -> None:
    """Raises unless experts can be quantised, without a look at their numbers."""
    prefix = f"{name}." if name else ""
    parts = quantized_parts(experts)
    if parts:
        first = next(iter(parts.values()))
        raise RuntimeError(f"{name or 'experts'} is quantised already ({first.format})")
    if isinstance(experts, GroupedExperts) and type(experts) is not GroupedExperts:
        raise TypeError(f"{name or 'experts'} ({type(experts).__name__}) must be GroupedExperts")
    lora = getattr(experts, "expert_lora", None)
    if lora is not None and lora.is_merged:
        raise RuntimeError(f"{prefix}expert_lora is merged: take it off or keep it for good first")
    for key in projections(experts):
        weight = experts.get_parameter(key)
        _checks.refuse_sharded(f"{prefix}{key}", weight)
        _checks.check_tensor(f"{prefix}{key}", weight, "[E, out, in]")
        width = weight.shape[1 if getattr(experts, "is_transposed", False) else 2]
        group_of(format, group_size, width, f"{prefix}{key}")


def projections(experts: nn.Module) -> tuple[str, str]:
    """The names of both stacked weights."""
    return "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj", "down_proj"


def convert(
    experts: nn.Module,
    format: str,
    group_size: int | None,
    zero_points: bool,
    quantize: Callable[[str, Tensor], QuantizedWeight] | None = None,
) -> None:
    """Quantises experts in place, on the meta device too; see `quantize_in_place`."""
    quantize_in_place(experts, projections(experts), format, group_size, zero_points, quantize)
    take_up(experts)


def take_up(experts: nn.Module) -> None:
    """Makes experts whose two weights are quantised compute from them."""
    if isinstance(experts, GroupedExperts):
        # Hooks, LoRA and other references to the module stay.
        experts.__class__ = QuantizedExperts
    else:
        experts.register_forward_pre_hook(_check_implementation)


def mark(model: nn.Module, format: str, group_size: int | None, zero_points: bool) -> None:
    """Records in the configuration of a model of transformers how it is quantised."""
    inner = innermost(model)
    if getattr(inner, "config", None) is None:
        return
    record = {
        "quantized_by": METHOD,
        "format": format,
        "group_size": group_size,
        "zero_points": zero_points,
    }
    setattr(inner.config, RECORD, record)
    # Weights are saved under their own names: what transformers would turn into one weight an
    # expert is not there.
    inner._weight_conversions = []


def _convert_calibrated(calibration: Calibration, options: tuple) -> None:
    """Quantises the experts that calibration reaches, each behind those before it."""
    pending = list(calibration.order)
    while pending:
        # In a function of its own, so that rows of one layer are held at a time.
        _calibrate_first(calibration, pending, options)
        pending.pop(0)


def _calibrate_first(calibration: Calibration, pending: list[nn.Module], options: tuple) -> None:
    experts = pending[0]
    seen = calibration.rows_of(experts, pending)
    rows = dict(zip(projections(experts), (seen.first, seen.down), strict=True))

    def quantize(name: str, weight: Tensor) -> QuantizedWeight:
        return calibration.quantize(experts, name, weight, rows[name], *options)

    convert(experts, *options, quantize)


def _check_implementation(experts: nn.Module, _inputs: tuple) -> None:
    chosen = experts.config._experts_implementation
    if chosen != METHOD:
        raise RuntimeError(
            f"experts_implementation is {chosen!r}: with quantised experts it must be {METHOD!r}"
        )
