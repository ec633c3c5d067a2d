"""Where the experts of whole models are, whatever wraps the models."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from unimoe_kernels.integrations.transformers import plain_gate
from unimoe_kernels.layers import GroupedExperts
from unimoe_kernels.layers.expert_lora import check_attachable
from unimoe_kernels.layers.quantized_projection import QuantizedProjection

# What wrappers put into the names of parameters.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def innermost(model: nn.Module) -> nn.Module:
    """The model inside of wrappers: compiled, data-parallel, or peft's."""
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
    """Experts with stacked weights, by the name that they have without wrappers.

    Raises:
        ValueError: If there are none.
    """
    found = [
        (clean(name), module)
        for name, module in innermost(model).named_modules()
        if _is_experts(module)
    ]
    if not found:
        raise ValueError(f"model ({type(model).__name__}) has no experts with stacked weights")
    return found


def attachable_experts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """`all_experts`, all of which may be given LoRA.

    Raises:
        ValueError: If there are none.
        RuntimeError: If some have LoRA already, or weights are sharded or replicated.
    """
    if isinstance(model, DistributedDataParallel):
        raise RuntimeError(
            "model (DistributedDataParallel) adds up gradients of the parameters that it found:"
            " LoRA of experts must be added or loaded before"
        )
    found = all_experts(model)
    for name, experts in found:
        check_attachable(experts, name)
    return found


def with_lora(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Experts that have LoRA, by the name that they have without wrappers.

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
    """A module's name without what wrappers inside of the model put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def peft_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that peft has put into a model, by the name that they have without wrappers."""
    tuner = sys.modules.get("peft.tuners.tuners_utils")
    if tuner is None:
        return {}
    return {
        clean(name): module
        for name, module in innermost(model).named_modules()
        if isinstance(module, tuner.BaseTunerLayer)
    }


def gate_is_in_halves(experts: nn.Module) -> bool:
    """Whether the first F rows of the gate's weight are the gate, and the others what it gates."""
    return isinstance(experts, GroupedExperts) or plain_gate(experts) is not None


def _is_experts(module: nn.Module) -> bool:
    stacked = isinstance(getattr(module, "down_proj", None), nn.Parameter | QuantizedProjection)
    return isinstance(module, GroupedExperts) or (stacked and hasattr(module, "has_gate"))
