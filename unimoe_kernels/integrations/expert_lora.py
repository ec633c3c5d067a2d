"""LoRA on the experts of whole models."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unimoe_kernels.integrations.model_experts import (
    attachable_experts,
    gate_is_in_halves,
    innermost,
    peft_layers,
    with_lora,
)
from unimoe_kernels.integrations.peft_adapter import read_adapter, write_adapter
from unimoe_kernels.integrations.peft_linears import load_linears
from unimoe_kernels.integrations.peft_reload import read_again
from unimoe_kernels.integrations.transformers import register_with_transformers
from unimoe_kernels.layers import GroupedExperts
from unimoe_kernels.layers.expert_lora import (
    HALVES,
    TARGETS,
    ExpertLoRA,
    attach,
    merge,
    merge_and_unload,
    new_lora,
    unmerge,
)


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
        ValueError: If r, dropout or target are wrong, the model has no experts, or its gate is not
            in halves where target splits it. Nothing is changed then.
        RuntimeError: If experts have LoRA already, or weights are sharded or replicated.
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
        RuntimeError: If the model has no expert LoRA.
    """
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
        RuntimeError: If the model has no expert LoRA, or it is merged already.
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
        RuntimeError: If the model has no expert LoRA, or it is not merged.
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
        RuntimeError: If the model has no expert LoRA.
    """
    for _, experts in list(with_lora(model)):
        merge_and_unload(experts)
    for module in model.modules():
        module.__dict__.pop("save_pretrained", None)
        module.__dict__.pop("load_adapter", None)
    return model


def save_expert_lora(model: nn.Module, folder: str | Path) -> None:
    """Writes the expert LoRA as an adapter that peft loads, and peft's own LoRA with it.

    `adapter_model.safetensors` holds what peft's `target_parameters` route calls by these names.
    Halves of the gate become one adapter of rank 2r, B block-diagonal, and `down_proj` is filled up
    with zeros to that rank. peft cannot drop inputs there: the file says dropout 0, whatever was
    trained with. LoRA that peft has put on linear layers, such as those of the attention, goes into
    the same adapter.

    Where weights are sharded every rank calls it; they are gathered, and rank 0 writes.

    Args:
        model: with LoRA by `add_expert_lora` or `load_expert_lora`; may be wrapped by peft,
            `torch.compile` or `DistributedDataParallel`.
        folder: made if it is not there; each file appears whole or not at all.

    Raises:
        RuntimeError: If the model has no expert LoRA.
        ValueError: If ranks or scales differ between experts modules, or peft's adapter is not
            plain LoRA. Nothing is written then.
    """
    write_adapter(model, Path(folder))


def load_expert_lora(model: nn.Module, folder: str | Path, dropout: float = 0.0) -> nn.Module:
    """Gives a model the LoRA of an adapter that peft or `save_expert_lora` wrote.

    What the adapter holds for experts becomes expert LoRA. What it holds for linear layers is put
    there by peft, or copied into the LoRA that peft has put there before.

    Args:
        model: without expert LoRA; changed in place, everything else is frozen.
        folder: holds adapter_config.json and adapter_model.safetensors.
        dropout: as for `add_expert_lora`.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the adapter holds anything but LoRA that fits this model: names, ranks,
            alpha, number of experts and widths are checked before anything is changed.
        RuntimeError: If experts have LoRA already, or weights are sharded or replicated.
        ImportError: If the adapter holds LoRA of linear layers and peft is missing.
    """
    folder = Path(folder)
    adapter = read_adapter(model, folder, dropout)
    if adapter.linears:
        load_linears(folder, adapter.config, model, adapter.linears)
    attach_all(model, adapter.experts)
    return model


def guard_saving(model: nn.Module) -> None:
    """Makes `save_pretrained` of a model, and of models in it, keep LoRA that is not merged.

    Without it transformers writes the weights below the LoRA, and peft its own adapter alone: both
    would come back as another model without a word. So would peft's adapter that is loaded again,
    as transformers' `Trainer` does when it resumes: `load_adapter` of peft's model is kept too.
    """
    modules = {id(module): module for module in (*model.modules(), *innermost(model).modules())}
    for module in modules.values():
        if hasattr(type(module), "save_pretrained") and _has_lora(module):
            module.save_pretrained = functools.partial(_save_pretrained, module)
            if innermost(module) is not module:
                module.load_adapter = functools.partial(_load_adapter, module)


def _save_pretrained(model: nn.Module, save_directory: str | Path, *args, **kwargs) -> Any:
    """`save_pretrained`, with the adapter in the same folder where expert LoRA is not merged.

    transformers loads such a folder as the model with its adapter, and what the weights' own file
    holds of the LoRA serves to go on training.
    """
    result = type(model).save_pretrained(model, save_directory, *args, **kwargs)
    merged = all(experts.expert_lora.is_merged for _, experts in with_lora(model))
    if not merged and kwargs.get("is_main_process", True):
        write_adapter(model, Path(save_directory), kwargs.get("state_dict"))
    return result


def _load_adapter(
    model: nn.Module, model_id: str | Path, adapter_name: str, *args, **kwargs
) -> Any:
    """`load_adapter` of peft's model, and the expert LoRA in the folder of an adapter it has."""
    again = read_again(model, Path(model_id)) if adapter_name in model.peft_config else ()
    result = type(model).load_adapter(model, model_id, adapter_name, *args, **kwargs)
    with torch.no_grad():
        for lora, lora_A, lora_B in again:
            lora.lora_A.copy_(lora_A)
            lora.lora_B.copy_(lora_B)
    return result


def _has_lora(model: nn.Module) -> bool:
    return any(getattr(module, "expert_lora", None) is not None for module in model.modules())


def attach_all(model: nn.Module, made: list[tuple[nn.Module, dict[str, ExpertLoRA]]]) -> None:
    """Freezes a model and gives its experts what was made for them."""
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


def _check_implementation(experts: nn.Module, _inputs: tuple) -> None:
    """A forward that knows nothing of our LoRA would leave it out without a word."""
    chosen = experts.config._experts_implementation
    lora = experts.expert_lora
    if chosen != "unimoe" and lora is not None and not lora.is_merged:
        raise RuntimeError(
            f"experts_implementation is {chosen!r}: with expert LoRA it must be 'unimoe'"
        )
