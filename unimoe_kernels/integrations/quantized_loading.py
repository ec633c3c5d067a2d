"""Loading of float models whose experts are quantised weight by weight as files are read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from unimoe_kernels.integrations import upcycle
from unimoe_kernels.integrations.model_experts import all_experts
from unimoe_kernels.integrations.quantize import (
    METHOD,
    RECORD,
    check_quantizable,
    mark,
    projections,
    take_up,
)
from unimoe_kernels.integrations.quantized_folder import class_of
from unimoe_kernels.integrations.transformers import register_with_transformers
from unimoe_kernels.layers import GroupedExperts
from unimoe_kernels.layers.quantized_experts import quantize_in_place
from unimoe_kernels.quantization.formats import check_options
from unimoe_kernels.quantization.rounding import quantize_weight
from unimoe_kernels.quantization.weight import QuantizedWeight

# If set, transformers reads each weight when it is needed, instead of all of them ahead of time.
_ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"


def load_and_quantize(
    folder: str | Path, format: str, group_size: int | None = None, zero_points: bool = False
) -> nn.Module:
    """Loads a float model and quantises its experts as their weights are read.

    The result is that of `quantize_experts(from_pretrained(folder), ...)`, but each stacked weight
    is quantised as soon as it is read, so memory holds at most one float weight of the experts. The
    dtype is that of the files.

    Args:
        folder: folder of a transformers model or a Uni-MoE, in safetensors.
        format: see `quantize_experts`.
        group_size: see `quantize_experts`.
        zero_points: see `quantize_experts`.

    Returns:
        The model in evaluation mode.

    Raises:
        ImportError: If transformers is missing.
        ValueError: See `quantize_experts`; also if weights of the configuration are missing.
    """
    import transformers

    register_with_transformers()
    config = transformers.AutoConfig.from_pretrained(folder)
    record = getattr(config, RECORD, None)
    if record is not None:
        raise ValueError(f"model ({folder}) is quantised already: {record}")
    check_options(format, group_size, zero_points)
    own, options = class_of(config), (format, group_size, zero_points)
    upcycled = getattr(config, upcycle.RECORD, None)
    base = own if upcycled is None else upcycle.upcycled_class(own, upcycled)
    with _one_by_one():
        model, report = _rounding_class(base, options).from_pretrained(
            folder, config=config, dtype="auto", output_loading_info=True
        )
    wrong = {
        key: min(map(str, report[key]))
        for key in report
        if key != "unexpected_keys" and report[key]
    }
    if wrong:
        key, first = next(iter(wrong.items()))
        raise ValueError(
            f"model ({folder}) must hold the weights of its config, such as {first}: {key}"
        )
    model.__class__ = own
    found = [experts for _, experts in all_experts(model)]
    for experts in found:
        experts.__class__ = type(experts).__mro__[1]
        take_up(experts)
    if any(not isinstance(experts, GroupedExperts) for experts in found):
        model.set_experts_implementation(METHOD)
    mark(model, *options)
    return model


def _rounding_class(base: type[nn.Module], options: tuple) -> type[nn.Module]:
    """Returns a subclass whose experts quantise each stacked weight set by `from_pretrained`."""

    class Rounding(base):
        def __init__(self, config, *args, **kwargs):
            super().__init__(config, *args, **kwargs)
            found = all_experts(self)
            for name, experts in found:
                check_quantizable(name, experts, *options[:2])
            for name, experts in found:
                _round_on_arrival(name, experts, options)

    # transformers derives the loss function from the class name.
    Rounding.__name__ = Rounding.__qualname__ = base.__name__
    return Rounding


def _round_on_arrival(name: str, experts: nn.Module, options: tuple) -> None:
    kind, keys = type(experts), projections(experts)
    format, group_size, zero_points = options

    def quantize(key: str, weight: Tensor) -> QuantizedWeight:
        return quantize_weight(
            weight, format, group_size, zero_points=zero_points, name=f"{name}.{key}"
        )

    def set_attribute(self: nn.Module, key: str, value: object) -> None:
        kind.__setattr__(self, key, value)
        if key in keys and isinstance(value, nn.Parameter) and not value.is_meta:
            quantize_in_place(self, (key,), *options, quantize)
            # Nothing is left to be initialised randomly.
            self._is_hf_initialized = getattr(self, key)._is_hf_initialized = True

    experts.__class__ = type(kind.__name__, (kind,), {"__setattr__": set_attribute})


@contextmanager
def _one_by_one() -> Iterator[None]:
    before = os.environ.get(_ONE_BY_ONE)
    os.environ[_ONE_BY_ONE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ONE_BY_ONE]
        else:
            os.environ[_ONE_BY_ONE] = before
