"""LoRA on the experts of whole models."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from unimoe_kernels.integrations.transformers import plain_gate, register_with_transformers
from unimoe_kernels.layers import GroupedExperts
from unimoe_kernels.layers.expert_lora import (
    HALVES,
    TARGETS,
    ExpertLoRA,
    attach,
    check_attachable,
    merge,
    merge_and_unload,
    new_lora,
    unmerge,
)

# What wrappers put into the names of parameters.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def add_expert_lora(
    model: nn.Module,
    r: int,
    alpha: float = 16,
    dropout: float = 0.0,
    target: Sequence[str] = ("gate_up_proj", "down_proj"),
) -> nn.Module:
    """Gives all experts of a model LoRA, and freezes everything else.

    The corrections run through `grouped_lora`: `W + B @ A` is never built, neither in the forward
    nor for the gradients. Serves models of transformers whose experts implementation can be chosen
    (`"unimoe"` is chosen here and has to stay), and models with `MoE` layers.

    In a model that peft has prepared already only the experts are frozen: LoRA of its attention
    goes on training. peft on top of expert LoRA freezes it; `train_expert_lora` undoes that.

    Args:
        model: changed in place; before `fully_shard`, `parallelize_moe`, `DistributedDataParallel`
            and the distributed plans of transformers.
        r: rank, at least 1.
        alpha: the corrections are scaled by `alpha / r`.
        dropout: probability with which inputs of the corrections are dropped in training.
        target: some of `"gate_up_proj"`, `"down_proj"`, or in place of the first `"gate_proj"` and
            `"up_proj"`, which then have an A of their own each, as in Uni-MoE.

    Returns:
        The same model.

    Raises:
        ValueError: if r, dropout or target are wrong, the model has no experts, or its gate is not
            in halves where target splits it. Nothing is changed then.
        RuntimeError: if experts have LoRA already, or weights are sharded or replicated.
    """
    target = tuple(target)
    if not target or set(target) - set(TARGETS):
        raise ValueError(f"target ({target}) must be some of {TARGETS}")
    if "gate_up_proj" in target and set(target) & set(HALVES):
        raise ValueError(f"target ({target}) must name gate_up_proj or its halves, not both")
    made = []
    for name, experts in attachable_experts(model):
        if set(target) & set(HALVES) and not gate_is_in_halves(experts):
            raise ValueError(f"target ({target}) must not split the gate of {name}: not in halves")
        loras = {key: new_lora(experts, key, r, alpha, dropout) for key in target}
        made.append((experts, loras))
    attach_all(model, made)
    return model


def train_expert_lora(model: nn.Module) -> nn.Module:
    """Lets the expert LoRA of a model train, whatever froze it; everything else stays as it is.

    `get_peft_model` and `PeftModel` freeze all that is not theirs, and save nothing else: call it
    after them, on what they return.

    Returns:
        The same model.

    Raises:
        RuntimeError: if the model has no expert LoRA.
    """
    from unimoe_kernels.integrations.peft_adapter import guard_saving

    for _, experts in with_lora(model):
        experts.expert_lora.requires_grad_(True)
    guard_saving(model)
    return model


def merge_expert_lora(model: nn.Module) -> nn.Module:
    """Adds all corrections to the weights, in place; the model computes the same, and faster.

    Sums are formed in at least float32 and rounded once to the dtype of the weight. That it is
    merged is part of the state dict. The LoRA stays, so that it can be taken off the weights again:
    `merge_and_unload_expert_lora` is for good.

    Raises:
        RuntimeError: if the model has no expert LoRA, or it is merged already.
    """
    found = list(with_lora(model))
    for name, experts in found:
        if experts.expert_lora.is_merged:
            raise RuntimeError(f"the LoRA of {name} is merged already")
    for _, experts in found:
        merge(experts)
    return model


def unmerge_expert_lora(model: nn.Module) -> nn.Module:
    """Takes merged corrections off the weights again, up to the rounding of both steps.

    Raises:
        RuntimeError: if the model has no expert LoRA, or it is not merged.
    """
    found = list(with_lora(model))
    for name, experts in found:
        if not experts.expert_lora.is_merged:
            raise RuntimeError(f"the LoRA of {name} is not merged")
    for _, experts in found:
        unmerge(experts)
    return model


def merge_and_unload_expert_lora(model: nn.Module) -> nn.Module:
    """Adds all corrections to the weights, where they are not yet, and removes the LoRA.

    The model is then one that never had expert LoRA, also in what it saves.

    Raises:
        RuntimeError: if the model has no expert LoRA.
    """
    for _, experts in list(with_lora(model)):
        merge_and_unload(experts)
    for module in model.modules():
        module.__dict__.pop("save_pretrained", None)
    return model


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
        ValueError: if there are none.
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
        ValueError: if there are none.
        RuntimeError: if some have LoRA already, or weights are sharded or replicated.
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
        RuntimeError: if there are none.
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


def attach_all(model: nn.Module, made: list[tuple[nn.Module, dict[str, ExpertLoRA]]]) -> None:
    """Freezes a model and gives its experts what was made for them."""
    from unimoe_kernels.integrations.peft_adapter import guard_saving

    if peft_layers(model):
        for experts, _ in made:
            for weight in experts.parameters(recurse=False):
                weight.requires_grad_(False)
    else:
        model.requires_grad_(False)
    for experts, loras in made:
        attach(experts, loras)
        if not isinstance(experts, GroupedExperts):
            experts.register_forward_pre_hook(_check_implementation)
    if any(not isinstance(experts, GroupedExperts) for experts, _ in made):
        register_with_transformers()
        innermost(model).set_experts_implementation("unimoe")
    guard_saving(model)


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
    stacked = isinstance(getattr(module, "down_proj", None), nn.Parameter)
    return isinstance(module, GroupedExperts) or (stacked and hasattr(module, "has_gate"))


def _check_implementation(experts: nn.Module, _inputs: tuple) -> None:
    """A forward that knows nothing of our LoRA would leave it out without a word."""
    chosen = experts.config._experts_implementation
    lora = experts.expert_lora
    if chosen != "unimoe" and lora is not None and not lora.is_merged:
        raise RuntimeError(
            f"experts_implementation is {chosen!r}: with expert LoRA it must be 'unimoe'"
        )
