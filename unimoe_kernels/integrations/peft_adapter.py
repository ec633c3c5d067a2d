"""peft adapter folders with the LoRA of experts and of linear layers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unimoe_kernels._files import atomic_write
from unimoe_kernels.integrations.model_experts import (
    attachable_experts,
    innermost,
    with_lora,
)
from unimoe_kernels.integrations.peft_linears import (
    PREFIX,
    check_kind,
    linear_adapter,
    linears_of,
    rank_and_scale,
    whole,
)
from unimoe_kernels.layers.expert_lora import (
    HALVES,
    ExpertLoRA,
    new_lora,
    shape_of,
    stacked_names,
)


class LoadedAdapter(NamedTuple):
    """The content of an adapter folder, checked against a model.

    Attributes:
        config: content of adapter_config.json.
        experts: experts modules, each with its LoRA by target.
        linears: output of `linears_of`.
    """

    config: dict[str, Any]
    experts: list[tuple[nn.Module, dict[str, ExpertLoRA]]]
    linears: Any


def read_adapter(model: nn.Module, folder: Path, dropout: float) -> LoadedAdapter:
    """Reads the adapter in a folder; the model is not changed.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the adapter contains anything other than LoRA that fits this model.
        RuntimeError: If experts already have LoRA, or weights are sharded or replicated.
    """
    config, tensors = read_files(folder)
    made = []
    for name, experts in attachable_experts(model):
        loras = take_experts(folder, config, tensors, name, experts, dropout)
        if loras:
            made.append((experts, loras))
    if not made:
        raise ValueError(f"folder ({folder}) has no LoRA for these experts: {sorted(tensors)}")
    return LoadedAdapter(config, made, linears_of(folder, config, model, tensors))


def read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns configuration and tensors of an adapter folder, which must be plain LoRA."""
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    check_kind(folder, config)
    return config, load_file(folder / "adapter_model.safetensors")


def take_experts(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    name: str,
    experts: nn.Module,
    dropout: float = 0.0,
) -> dict[str, ExpertLoRA]:
    """Creates the LoRA of one experts module from tensors of an adapter, removing these."""
    loras = {}
    keys = _targeted(config, name, experts)
    for index, key in enumerate(keys):
        stem = f"{PREFIX}{name}.{'base_layer.' * (len(keys) - 1 - index)}lora_"
        pair = tensors.pop(f"{stem}A.weight", None), tensors.pop(f"{stem}B.weight", None)
        if None in pair:
            raise ValueError(f"folder ({folder}) has no {stem}A.weight and {stem}B.weight")
        rank, scale = rank_and_scale(config, f"{name}.{key}")
        loras[key] = _from_peft(folder, experts, f"{name}.{key}", *pair, rank, scale, dropout)
    return loras


def write_adapter(
    model: nn.Module, folder: Path, state: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the LoRA of a model's experts, and peft's of its linear layers, as one adapter.

    Args:
        model: a model with expert LoRA.
        folder: output folder, created if it does not exist.
        state: tensors by name that are written instead of those of the model.

    Raises:
        RuntimeError: If the model has no expert LoRA.
        ValueError: If ranks or scales differ between experts, or peft's adapter is not plain LoRA.
    """
    from safetensors.torch import save_file

    from unimoe_kernels.distributed.running.world import write_once

    adapter = _expert_adapter(model, state)
    sharded = state is None and any(
        hasattr(parameter, "full_tensor") for parameter in model.parameters()
    )
    linears, theirs = linear_adapter(model)
    config, tensors = _joined(adapter, theirs), adapter.tensors | linears
    config["base_model_name_or_path"] = getattr(
        getattr(innermost(model), "config", None), "name_or_path", None
    )

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            atomic_write(folder / "adapter_config.json") as config_path,
            atomic_write(folder / "adapter_model.safetensors") as weights_path,
        ):
            config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            save_file(tensors, weights_path, metadata={"format": "pt"})

    if sharded:
        write_once(f"save of {folder}", write)
    else:
        write()


class _Adapter(NamedTuple):
    """Expert LoRA in peft's format: tensors by name, target parameters and their sizes."""

    tensors: dict[str, Tensor]
    names: list[str]
    rank: int
    scale: float


def _expert_adapter(model: nn.Module, state: Mapping[str, Tensor] | None) -> _Adapter:
    tensors, names, ranks, scales = {}, [], set(), set()
    for name, experts in with_lora(model):
        adapters = _as_peft(name, experts.expert_lora, state)
        keys = [key for key in stacked_names(experts) if key in adapters]
        for index, key in enumerate(keys):
            lora_A, lora_B, scale = adapters[key]
            # peft wraps parameters one by one, the last one outermost.
            inner = "base_layer." * (len(keys) - 1 - index)
            tensors[f"{PREFIX}{name}.{inner}lora_A.weight"] = lora_A.flatten(0, 1).contiguous()
            # In columns of B, the expert index varies fastest.
            tensors[f"{PREFIX}{name}.{inner}lora_B.weight"] = (
                lora_B.permute(1, 2, 0).flatten(1).contiguous()
            )
            names.append(f"{name}.{key}")
            ranks.add(lora_A.shape[1])
            scales.add(scale)
    if len(ranks) > 1 or len(scales) > 1:
        raise ValueError(
            f"LoRA of ranks {sorted(ranks)} and scales {sorted(scales)} must be of one rank and "
            "scale to be saved as one adapter"
        )
    (rank,), (scale,) = ranks, scales
    return _Adapter(tensors, names, rank, scale)


def _joined(adapter: _Adapter, theirs: dict[str, Any] | None) -> dict[str, Any]:
    if theirs is None:
        return {
            "peft_type": "LORA",
            "r": adapter.rank,
            "lora_alpha": adapter.scale * adapter.rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": [],
            "target_parameters": adapter.names,
            "inference_mode": True,
            "task_type": None,
        }
    alpha = adapter.scale * (math.sqrt(adapter.rank) if theirs.get("use_rslora") else adapter.rank)
    kept = {key: value for key, value in theirs.items() if _is_json(value)}
    return kept | {
        "lora_dropout": 0.0,
        "inference_mode": True,
        "target_parameters": adapter.names,
        # The first pattern that matches a name counts, here as in peft.
        "rank_pattern": dict.fromkeys(adapter.names, adapter.rank) | theirs["rank_pattern"],
        "alpha_pattern": dict.fromkeys(adapter.names, alpha) | theirs["alpha_pattern"],
    }


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _targeted(config: dict[str, Any], name: str, experts: nn.Module) -> list[str]:
    """Returns the parameters of an experts module that an adapter targets."""
    targets = config.get("target_parameters") or []
    return [
        key
        for key in stacked_names(experts)
        if any(f"{name}.{key}" == one or f"{name}.{key}".endswith(f".{one}") for one in targets)
    ]


def _as_peft(
    name: str, lora: nn.ModuleDict, state: Mapping[str, Tensor] | None
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Returns A, B and scale of each stacked weight, with joined gate halves and a common rank."""

    def read(key: str, part: str) -> Tensor:
        saved = (state or {}).get(f"{name}.expert_lora.{key}.{part}")
        return whole(getattr(lora[key], part) if saved is None else saved).cpu()

    adapters = {
        key: (read(key, "lora_A"), read(key, "lora_B"), one.scale) for key, one in lora.items()
    }
    halves = [key for key in HALVES if key in adapters]
    if not halves:
        return adapters
    (A, B, scale), rank = adapters[halves[0]], lora[halves[0]].rank
    joined_A = A.new_zeros(A.shape[0], 2 * rank, A.shape[2])
    joined_B = B.new_zeros(B.shape[0], 2 * B.shape[1], 2 * rank)
    for key in halves:
        A, B, _ = adapters.pop(key)
        second = HALVES.index(key)
        joined_A[:, second * rank : (second + 1) * rank] = A
        rows = slice(second * B.shape[1], (second + 1) * B.shape[1])
        joined_B[:, rows, second * rank : (second + 1) * rank] = B
    if "down_proj" in adapters:
        A, B, _ = adapters["down_proj"]
        zeros_A, zeros_B = torch.zeros_like(A), torch.zeros_like(B)
        filled = torch.cat((A, zeros_A), dim=1), torch.cat((B, zeros_B), dim=2)
        adapters["down_proj"] = (*filled, scale)
    return adapters | {"gate_up_proj": (joined_A, joined_B, scale)}


def _from_peft(
    folder: Path,
    experts: nn.Module,
    name: str,
    A: Tensor,
    B: Tensor,
    rank: int,
    scale: float,
    dropout: float,
) -> ExpertLoRA:
    key = name.rpartition(".")[2]
    num_experts, rows, columns = shape_of(experts, key)
    expected = (num_experts * rank, columns), (rows, num_experts * rank)
    if (A.shape, B.shape) != expected:
        raise ValueError(
            f"folder ({folder}): LoRA of {name} (A {list(A.shape)}, B {list(B.shape)}) must be"
            f" A {list(expected[0])}, B {list(expected[1])}: rank {rank} of adapter_config.json,"
            f" {num_experts} experts with {rows} rows and {columns} columns"
        )
    lora = new_lora(experts, key, rank, scale * rank, dropout)
    with torch.no_grad():
        lora.lora_A.copy_(A.view(num_experts, rank, columns))
        lora.lora_B.copy_(B.view(rows, rank, num_experts).permute(2, 0, 1))
    return lora
