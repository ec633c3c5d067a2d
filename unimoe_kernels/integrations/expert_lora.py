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
from unimoe_kernels.integrations.stale_adapter import adapter_state, remove_stale_adapter
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
    """Adds LoRA to all experts of a model and freezes everything else.

    The corrections are computed by `grouped_lora`: `W + B @ A` is never materialised, neither in
    the forward nor for the gradients. Supported are transformers models whose experts
    implementation can be selected (the function selects `"unimoe"`, which must not be changed) and
    models with `MoE` layers.

    In a model that peft has already prepared, only the experts are frozen: LoRA of its attention
    remains trainable. Applying peft after expert LoRA freezes the latter; `train_expert_lora`
    undoes this.

    Args:
        model: the model, changed in place. Call this before `fully_shard`, `parallelize_moe`,
            `DistributedDataParallel` and the distributed plans of transformers.
        r: rank, at least 1.
        alpha: the corrections are scaled by `alpha / r`.
        dropout: dropout probability of the corrections' inputs in training.
        target: one or more of `"gate_up_proj"` and `"down_proj"`. Instead of `"gate_up_proj"`, use
            `"gate_proj"` and `"up_proj"` for a separate A each, as in Uni-MoE.

    Returns:
        The same model.

    Raises:
        ValueError: If r, dropout or target is invalid, the model has no experts, or target splits a
            gate that is not stored in halves. Nothing is changed in this case.
        RuntimeError: If experts already have LoRA, or weights are sharded or replicated.
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
    """Makes the expert LoRA of a model trainable; everything else is not changed.

    `get_peft_model` and `PeftModel` freeze all parameters but their own: call this function
    afterwards on the model that they return.

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
    """Adds all corrections to the weights in place; outputs are the same and computed faster.

    Sums are computed in at least float32 and rounded once to the dtype of the weight. The state
    dict records that the LoRA is merged. The LoRA is kept, so that `unmerge_expert_lora` can undo
    the merge; `merge_and_unload_expert_lora` removes it.

    Returns:
        The same model.

    Raises:
        RuntimeError: If the model has no expert LoRA, or it is already merged.
    """
    found = list(with_lora(model))
    for name, experts in found:
        if experts.expert_lora.is_merged:
            raise RuntimeError(f"the LoRA of {name} is already merged")
    for _, experts in found:
        merge(experts)
    return model


def unmerge_expert_lora(model: nn.Module) -> nn.Module:
    """Subtracts merged corrections from the weights, up to the rounding of both steps.

    Returns:
        The same model.

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
    """Adds corrections that are not merged to the weights, and removes the LoRA.

    The model and its state dict are then like those of a model without expert LoRA.

    Returns:
        The same model.

    Raises:
        RuntimeError: If the model has no expert LoRA.
    """
    for _, experts in list(with_lora(model)):
        merge_and_unload(experts)
    for module in model.modules():
        if module.__dict__.pop("save_pretrained", None) is not None:
            module.save_pretrained = functools.partial(_save_pretrained, module)
        module.__dict__.pop("load_adapter", None)
    return model


def save_expert_lora(model: nn.Module, folder: str | Path) -> None:
    """Saves the expert LoRA, and peft's own LoRA, as an adapter that peft can load.

    The tensors in `adapter_model.safetensors` have the names of peft's `target_parameters`.
    Separate LoRA of gate and up is saved as one adapter of rank 2r with a block-diagonal B, and
    `down_proj` is padded with zeros to that rank. peft does not support dropout for
    `target_parameters`: the saved dropout is 0, whatever was used in training. LoRA that peft has
    added to linear layers, such as those of attention, is saved in the same adapter.

    If weights are sharded, all ranks must call this function; the weights are gathered, and rank 0
    writes.

    Args:
        model: a model with LoRA from `add_expert_lora` or `load_expert_lora`; may be wrapped by
            peft, `torch.compile` or `DistributedDataParallel`.
        folder: output folder, created if it does not exist; files are written atomically.

    Raises:
        RuntimeError: If the model has no expert LoRA.
        ValueError: If ranks or scales differ between experts modules, or peft's adapter is not
            plain LoRA. Nothing is written in this case.
    """
    write_adapter(model, Path(folder))


def load_expert_lora(model: nn.Module, folder: str | Path, dropout: float = 0.0) -> nn.Module:
    """Loads the LoRA of an adapter written by peft or `save_expert_lora` into a model.

    LoRA of experts becomes expert LoRA. LoRA of linear layers is added by peft, or copied into
    the LoRA that peft has already added.

    Args:
        model: a model without expert LoRA, changed in place; everything else is frozen.
        folder: folder with adapter_config.json and adapter_model.safetensors.
        dropout: see `add_expert_lora`.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the adapter contains anything other than LoRA that fits this model: names,
            ranks, alpha, number of experts and widths are checked before anything is changed.
        RuntimeError: If experts already have LoRA, or weights are sharded or replicated.
        ImportError: If the adapter has LoRA of linear layers and peft is not installed.
    """
    folder = Path(folder)
    adapter = read_adapter(model, folder, dropout)
    if adapter.linears:
        load_linears(folder, adapter.config, model, adapter.linears)
    attach_all(model, adapter.experts)
    return model


def guard_saving(model: nn.Module) -> None:
    """Makes `save_pretrained` of a model, and of models in it, keep LoRA that is not merged.

    Otherwise transformers would save only the weights without the LoRA, and peft only its own
    adapter; either would silently load as a different model. For the same reason `load_adapter` of
    a peft model, which transformers' `Trainer` calls when it resumes, is made to load expert LoRA.
    """
    modules = {id(module): module for module in (*model.modules(), *innermost(model).modules())}
    for module in modules.values():
        if hasattr(type(module), "save_pretrained") and _has_lora(module):
            module.save_pretrained = functools.partial(_save_pretrained, module)
            if innermost(module) is not module:
                module.load_adapter = functools.partial(_load_adapter, module)


def _save_pretrained(model: nn.Module, save_directory: str | Path, *args, **kwargs) -> Any:
    """`save_pretrained` that also saves expert LoRA, if not merged, as an adapter in the folder.

    transformers loads such a folder as the model with its adapter; the LoRA in the weights' own
    file is for resuming training. An adapter of an earlier save is removed where the weights
    include the LoRA: it would be added again.
    """
    folder = Path(save_directory)
    before = adapter_state(folder)
    result = type(model).save_pretrained(model, save_directory, *args, **kwargs)
    merged = not _has_lora(model) or all(
        experts.expert_lora.is_merged for _, experts in with_lora(model)
    )
    if not kwargs.get("is_main_process", True):
        return result
    if not merged:
        write_adapter(model, folder, kwargs.get("state_dict"))
    else:
        remove_stale_adapter(folder, before)
    return result


def _load_adapter(
    model: nn.Module, model_id: str | Path, adapter_name: str, *args, **kwargs
) -> Any:
    """`load_adapter` of peft's model that also loads expert LoRA from the adapter folder."""
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
    """Freezes a model and adds new LoRA to its experts."""
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
    """Raises an error if another experts implementation would silently ignore the LoRA."""
    chosen = experts.config._experts_implementation
    lora = experts.expert_lora
    if chosen != "unimoe" and lora is not None and not lora.is_merged:
        raise RuntimeError(
            f"experts_implementation is {chosen!r}: with expert LoRA it must be 'unimoe'"
        )
