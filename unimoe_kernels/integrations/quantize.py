"""Quantisation of the experts of whole models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from unimoe_kernels import _checks
from unimoe_kernels.integrations.calibration import Calibration, evaluating
from unimoe_kernels.integrations.model_experts import all_experts, innermost, peft_layers
from unimoe_kernels.integrations.transformers import register_with_transformers
from unimoe_kernels.layers import GroupedExperts, QuantizedExperts
from unimoe_kernels.layers.quantized_experts import quantize_in_place
from unimoe_kernels.layers.quantized_projection import quantized_parts
from unimoe_kernels.quantization.formats import check_options, group_of
from unimoe_kernels.quantization.rounding import check_finite
from unimoe_kernels.quantization.weight import QuantizedWeight

# The configuration key that transformers reads before it loads a folder. Without `quant_method` it
# raises an error; with an unknown one it would only warn, and initialise the experts randomly.
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
    """Quantises the weights of all experts of a model in place, one stacked weight after the other.

    Each float weight is released as soon as it is quantised, so memory never holds more than the
    model and one quantised weight. The experts then compute with the quantised weights, which are
    frozen; LoRA on top of them can be trained (`add_expert_lora`, `GroupedExperts.add_lora`). The
    rest of the model, such as attention and routers, is not changed.

    Supported are `GroupedExperts`, by itself or in `MoE` and whole models, and transformers models
    with a selectable experts implementation (`"unimoe"` is selected here and must not be changed).
    A transformers model is saved with `save_pretrained` and loaded with `load_quantized`.

    Example:
        >>> moe = quantize_experts(MoE(64, 128, num_experts=4, top_k=2), "int4", group_size=64)
        >>> moe.experts.gate_up_proj
        QuantizedProjection((4, 256, 64), format='int4', group_size=64, zero_points=False)

    Args:
        model: the model, before it is compiled, sharded or split between ranks.
        format: `"int8"` or `"int4"`.
        group_size: numbers along the sum that share a scale: 32, 64 or 128. None is one scale per
            output row for `"int8"` and 64 for `"int4"`.
        zero_points: whether groups also have zero points; `"int4"` only.
        calibration: None to round to nearest, or inputs of the model with a few hundred tokens or
            more: mappings of keyword arguments, tuples of positional arguments, or single
            arguments. Weights are then rounded to minimise the change of each expert's outputs on
            the rows routed to it (GPTQ, arXiv 2210.17323). Layers are calibrated in order, each on
            the outputs of the quantised layers before it. Experts with fewer than 16 rows are
            rounded to nearest, and a warning names them. The formats, and the speed of the result,
            are the same.

    Returns:
        The same model.

    Raises:
        ValueError: If the model has no experts, the format is unknown, a width is not a multiple of
            the group size, weights contain NaN or infinity or are sharded, or `calibration` is
            empty or produces NaN or infinity in a layer of experts. The model is then unchanged.
        TypeError: If the model is not a module, experts are of a subclass of `GroupedExperts`,
            `zero_points` is not a bool, or `calibration` is a single input or a string.
        RuntimeError: If experts are already quantised, LoRA is merged into their weights, or peft
            has added LoRA to them.
    """
    check_options(format, group_size, zero_points)
    found = all_experts(model)
    _refuse_adapters_of_peft(model)
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


def _refuse_adapters_of_peft(model: nn.Module) -> None:
    """Refuses peft's `target_parameters` on experts, which require the float parameters."""
    for name, layer in peft_layers(model).items():
        parameter = getattr(layer, "parameter_name", None)
        if parameter is not None and parameter in projections(layer.get_base_layer()):
            raise RuntimeError(
                f"{name}.{parameter} has LoRA of peft's target_parameters, which requires the"
                " float weight: quantise first, then call add_expert_lora()"
            )


def check_quantizable(name: str, experts: nn.Module, format: str, group_size: int | None) -> None:
    """Raises an error if experts cannot be quantised; the values of weights are not checked."""
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
    """Returns the names of both stacked weights."""
    return "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj", "down_proj"


def convert(
    experts: nn.Module,
    format: str,
    group_size: int | None,
    zero_points: bool,
    quantize: Callable[[str, Tensor], QuantizedWeight] | None = None,
) -> None:
    """Quantises experts in place, also on the meta device; see `quantize_in_place`."""
    quantize_in_place(experts, projections(experts), format, group_size, zero_points, quantize)
    take_up(experts)


def take_up(experts: nn.Module) -> None:
    """Switches experts to computing with their two quantised weights."""
    if isinstance(experts, GroupedExperts):
        # Assigning the class keeps hooks, LoRA and other references to the module.
        experts.__class__ = QuantizedExperts
    else:
        experts.register_forward_pre_hook(_check_implementation)


def mark(model: nn.Module, format: str, group_size: int | None, zero_points: bool) -> None:
    """Records the quantisation options in the configuration of a transformers model."""
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
    # Weights are saved under their own names: the float weights that transformers would split into
    # one weight per expert do not exist.
    inner._weight_conversions = []


def _convert_calibrated(calibration: Calibration, options: tuple) -> None:
    """Quantises the experts reached by calibration in order, each after those before it."""
    pending = list(calibration.order)
    while pending:
        # A separate function, so that the rows of only one layer are in memory at a time.
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
