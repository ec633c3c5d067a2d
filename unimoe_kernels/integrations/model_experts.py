"""Lookup of the experts in whole models, which may be wrapped."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from unimoe_kernels.integrations.transformers import plain_gate
from unimoe_kernels.layers import GroupedExperts
from unimoe_kernels.layers.expert_lora import check_attachable
from unimoe_kernels.layers.quantized_projection import QuantizedProjection

# Parts that wrappers insert into the names of parameters.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def innermost(model: nn.Module) -> nn.Module:
    """Returns the model inside wrappers of torch.compile, data parallelism and peft."""
    peft_model = getattr(sys.modules.get("peft"), "PeftModel", ())
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(model, peft_model):
            model = model.get_base_model()
        else:
            return model


def all_experts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns experts with stacked weights, by their names without wrappers.

    Raises:
        TypeError: If the model is not a module.
        ValueError: If there are none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model ({type(model).__name__}) must be a torch.nn.Module")
    found = [
        (clean(name), module)
        for name, module in innermost(model).named_modules()
        if _is_experts(module)
    ]
    if not found:
        raise ValueError(f"model ({type(model).__name__}) has no experts with stacked weights")
    return found


def attachable_experts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns `all_experts` after checking that LoRA can be added to them.

    Raises:
        ValueError: If there are none.
        RuntimeError: If some already have LoRA, or weights are sharded or replicated.
    """
    if isinstance(model, DistributedDataParallel):
        raise RuntimeError(
            "model (DistributedDataParallel) reduces only gradients of parameters that existed when"
            " it was created: LoRA of experts must be added or loaded before"
        )
    found = all_experts(model)
    for name, experts in found:
        check_attachable(experts, name)
    return found


def with_lora(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields experts that have LoRA, by their names without wrappers.

    Raises:
        RuntimeError: If there are none.
    """
    found = [
        (clean(name), module)
        for name, module in innermost(model).named_modules()
        if getattr(module, "expert_lora", None) is not None
    ]
    if not found:
        raise RuntimeError("the model has no expert LoRA; call add_expert_lora() first")
    yield from found


def clean(name: str) -> str:
    """Returns a module's name without the parts that wrappers inside the model insert."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def peft_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers that peft has added to a model, by their names without wrappers."""
    tuner = sys.modules.get("peft.tuners.tuners_utils")
    if tuner is None:
        return {}
    return {
        clean(name): module
        for name, module in innermost(model).named_modules()
        if isinstance(module, tuner.BaseTunerLayer)
    }


def gate_is_in_halves(experts: nn.Module) -> bool:
    """Returns whether the first F rows of the weight are the gate and the last F rows are up."""
    return isinstance(experts, GroupedExperts) or plain_gate(experts) is not None


def _is_experts(module: nn.Module) -> bool:
    stacked = isinstance(getattr(module, "down_proj", None), nn.Parameter | QuantizedProjection)
    return isinstance(module, GroupedExperts) or (stacked and hasattr(module, "has_gate"))
