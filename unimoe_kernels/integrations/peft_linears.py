"""LoRA that peft has added to linear layers, read from and written to peft's adapters."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unimoe_kernels.integrations.model_experts import innermost, peft_layers

PREFIX = "base_model.model."


def check_kind(folder: Path | None, config: dict[str, Any]) -> None:
    """Raises ValueError unless an adapter, in a folder or on a model, is plain LoRA."""
    place = "peft's adapter" if folder is None else f"folder ({folder})"
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise ValueError(f"{place}: peft_type must be LORA without DoRA")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{place}: bias ({config['bias']!r}) must be 'none'")


def rank_and_scale(config: dict[str, Any], name: str) -> tuple[int, float]:
    """Returns rank and scale of a module or parameter, following peft's patterns."""

    def chosen(patterns: str, default: str) -> Any:
        for pattern, value in (config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        return config[default]

    rank, alpha = chosen("rank_pattern", "r"), chosen("alpha_pattern", "lora_alpha")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def whole(tensor: Tensor) -> Tensor:
    """Returns a full, detached tensor; for a sharded tensor, all of its ranks must call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def linear_adapter(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Returns tensors and configuration of peft's LoRA in a model; the latter None without LoRA."""
    layers = peft_layers(model)
    if not layers:
        return {}, None
    from peft import get_peft_model_state_dict

    inner = innermost(model)
    active = {tuple(layer.active_adapters) for layer in layers.values()}
    if len(active) != 1 or len(next(iter(active))) != 1:
        raise ValueError(f"adapters of peft ({sorted(active)}) must be one")
    (name,) = next(iter(active))
    config = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in inner.peft_config[name].to_dict().items()
    }
    if config.get("target_parameters"):
        raise ValueError(
            f"target_parameters ({config['target_parameters']}) of peft's adapter must be empty"
            " with expert LoRA"
        )
    check_kind(None, config)
    tensors = {
        f"{PREFIX}{key}": whole(value).cpu().contiguous()
        for key, value in get_peft_model_state_dict(inner, adapter_name=name).items()
        if ".expert_lora." not in key
    }
    return tensors, config


def linears_of(
    folder: Path, config: dict[str, Any], model: nn.Module, tensors: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns A and B of linear layers, by the layers' names, checked against the model."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    inner, layers, left = innermost(model), peft_layers(model), dict(tensors)
    for key in sorted(tensors):
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        A, B = left.pop(key), left.pop(key.replace(".lora_A.", ".lora_B."), None)
        layer = layers.get(name) or _submodule(inner, name)
        weight = getattr(getattr(layer, "base_layer", layer), "weight", None)
        rank, _ = rank_and_scale(config, name)
        shapes = None if weight is None else ((rank, weight.shape[-1]), (weight.shape[0], rank))
        if B is None or shapes != (tuple(A.shape), tuple(B.shape)):
            raise ValueError(
                f"folder ({folder}): LoRA of {name} (A {list(A.shape)}, B"
                f" {'missing' if B is None else list(B.shape)}) must fit a linear layer of this"
                f" model with rank {rank}: {'there is none' if shapes is None else shapes}"
            )
        found[name] = (A, B)
    if left:
        raise ValueError(
            f"folder ({folder}) has more than LoRA of these experts and linear layers:"
            f" {sorted(left)}"
        )
    return found


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def load_linears(
    folder: Path,
    config: dict[str, Any],
    model: nn.Module,
    linears: dict[str, tuple[Tensor, Tensor]],
) -> None:
    """Copies A and B into peft's LoRA of a model, which peft first adds if it is missing."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f"folder ({folder}) has LoRA of linear layers, which requires peft: pip install peft"
        ) from error
    layers = peft_layers(model)
    if not layers:
        targets = set(config.get("target_parameters") or [])
        known = {
            key: value
            for key, value in config.items()
            if key in peft.LoraConfig.__dataclass_fields__ and key != "target_parameters"
        }
        for pattern in ("rank_pattern", "alpha_pattern"):
            known[pattern] = {
                key: value
                for key, value in (config.get(pattern) or {}).items()
                if key not in targets
            }
        known |= {"inference_mode": False, "target_modules": sorted(linears)}
        peft.inject_adapter_in_model(peft.LoraConfig(**known), innermost(model))
        layers = peft_layers(model)
    if set(layers) != set(linears):
        raise ValueError(
            f"folder ({folder}) has LoRA of {sorted(linears)}, but the model has peft's LoRA on"
            f" {sorted(layers)}"
        )
    for name in linears:
        (adapter,) = layers[name].active_adapters
        rank, scale = rank_and_scale(config, name)
        if (layers[name].r[adapter], layers[name].scaling[adapter]) != (rank, scale):
            raise ValueError(
                f"folder ({folder}): LoRA of {name} (rank {rank}, scale {scale}) must be that of"
                f" peft (rank {layers[name].r[adapter]}, scale {layers[name].scaling[adapter]})"
            )
    with torch.no_grad():
        for name, (A, B) in linears.items():
            (adapter,) = layers[name].active_adapters
            layers[name].lora_A[adapter].weight.copy_(A)
            layers[name].lora_B[adapter].weight.copy_(B)
