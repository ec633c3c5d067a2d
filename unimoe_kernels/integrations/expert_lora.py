"""LoRA on the experts of whole models, and peft's adapter files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from unimoe_kernels.integrations.transformers import plain_gate, register_with_transformers
from unimoe_kernels.layers import GroupedExperts
from unimoe_kernels.layers.expert_lora import HALVES, TARGETS, ExpertLoRA, add_deltas, weight_of

_PREFIX = "base_model.model."


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

    Args:
        model: changed in place.
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
        RuntimeError: if experts have LoRA already.
    """
    target = tuple(target)
    if not target or set(target) - set(TARGETS):
        raise ValueError(f"target ({target}) must be some of {TARGETS}")
    if "gate_up_proj" in target and set(target) & set(HALVES):
        raise ValueError(f"target ({target}) must name gate_up_proj or its halves, not both")
    found = _all_experts(model)
    made = []
    for name, experts in found:
        if getattr(experts, "expert_lora", None) is not None:
            raise RuntimeError(f"{name} has LoRA already; merge it or take it off first")
        if set(target) & set(HALVES) and not _gate_is_in_halves(experts):
            raise ValueError(f"target ({target}) must not split the gate of {name}: not in halves")
        made.append({key: _new_lora(experts, key, r, alpha, dropout) for key in target})
    model.requires_grad_(False)
    for (_, experts), lora in zip(found, made, strict=True):
        _attach(experts, lora)
    _choose_unimoe(model, found)
    return model


def merge_expert_lora(model: nn.Module) -> nn.Module:
    """Adds all corrections to the weights, in place; the model computes the same, and faster.

    Sums are formed in at least float32 and rounded once to the dtype of the weight.

    Raises:
        RuntimeError: if the model has no expert LoRA, or it is merged already.
    """
    return _merge(model, True)


def unmerge_expert_lora(model: nn.Module) -> nn.Module:
    """Takes merged corrections off the weights again, up to the rounding of both steps.

    Raises:
        RuntimeError: if the model has no expert LoRA, or it is not merged.
    """
    return _merge(model, False)


def save_expert_lora(model: nn.Module, folder: str | Path) -> None:
    """Writes the expert LoRA as an adapter that peft loads.

    `adapter_model.safetensors` holds what peft's `target_parameters` route calls by these names.
    Halves of the gate become one adapter of rank 2r, B block-diagonal, and `down_proj` is filled up
    with zeros to that rank. peft cannot drop inputs there: the file says dropout 0, whatever was
    trained with.

    Args:
        model: with LoRA by `add_expert_lora` or `load_expert_lora`.
        folder: made if it is not there; the weights appear whole or not at all.

    Raises:
        RuntimeError: if the model has no expert LoRA.
        ValueError: if ranks or scales differ between experts modules.
    """
    from safetensors.torch import save_file

    tensors, names, ranks, scales = {}, [], set(), set()
    for name, experts in _with_lora(model):
        adapters = _as_peft(experts.expert_lora)
        keys = _parameter_order(experts, adapters)
        for index, key in enumerate(keys):
            lora_A, lora_B, scale = adapters[key]
            # peft wraps one parameter after the other, the last one outermost.
            inner = "base_layer." * (len(keys) - 1 - index)
            tensors[f"{_PREFIX}{name}.{inner}lora_A.weight"] = lora_A.flatten(0, 1).contiguous()
            # Columns of B run over experts first.
            tensors[f"{_PREFIX}{name}.{inner}lora_B.weight"] = (
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
    (r,), (scale,) = ranks, scales
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": scale * r,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [],
        "target_parameters": names,
        "inference_mode": True,
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / "adapter_model.safetensors.new"
    # safetensors makes its files readable by their owner alone; the umask decides instead.
    fresh.touch()
    mode = fresh.stat().st_mode & 0o777
    save_file(tensors, fresh, metadata={"format": "pt"})
    fresh.chmod(mode)
    text = json.dumps(config, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    fresh.rename(folder / "adapter_model.safetensors")


def load_expert_lora(model: nn.Module, folder: str | Path, dropout: float = 0.0) -> nn.Module:
    """Gives a model the expert LoRA of an adapter that peft or `save_expert_lora` wrote.

    Args:
        model: without expert LoRA; changed in place, everything else is frozen.
        folder: holds adapter_config.json and adapter_model.safetensors.
        dropout: as for `add_expert_lora`.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the adapter holds anything but LoRA on experts of this model.
        RuntimeError: if experts have LoRA already.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise ValueError(f"folder ({folder}): peft_type must be LORA without DoRA")
    for name in ("rank_pattern", "alpha_pattern"):
        if config.get(name):
            raise ValueError(f"folder ({folder}): {name} ({config[name]}) must be empty")
    targets = config.get("target_parameters") or []
    tensors = load_file(folder / "adapter_model.safetensors")
    r = config["r"]
    scale = config["lora_alpha"] / (r**0.5 if config.get("use_rslora") else r)
    found, made = [], []
    for name, experts in _all_experts(model):
        if getattr(experts, "expert_lora", None) is not None:
            raise RuntimeError(f"{name} has LoRA already; merge it or take it off first")
        keys = [
            key
            for key, _ in experts.named_parameters(recurse=False)
            if any(f"{name}.{key}" == one or f"{name}.{key}".endswith(f".{one}") for one in targets)
        ]
        lora = {}
        for index, key in enumerate(keys):
            stem = f"{_PREFIX}{name}.{'base_layer.' * (len(keys) - 1 - index)}lora_"
            pair = tensors.pop(f"{stem}A.weight", None), tensors.pop(f"{stem}B.weight", None)
            if None in pair:
                raise ValueError(f"folder ({folder}) has no {stem}A.weight and {stem}B.weight")
            lora[key] = _from_peft(experts, key, *pair, scale, dropout)
        if lora:
            found.append((name, experts))
            made.append(lora)
    if tensors or not made:
        raise ValueError(f"folder ({folder}) holds no LoRA on these experts: {sorted(tensors)}")
    model.requires_grad_(False)
    for (_, experts), lora in zip(found, made, strict=True):
        _attach(experts, lora)
    _choose_unimoe(model, found)
    return model


def _all_experts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    found = [(name, module) for name, module in model.named_modules() if _is_experts(module)]
    if not found:
        raise ValueError(f"model ({type(model).__name__}) has no experts with stacked weights")
    return found


def _is_experts(module: nn.Module) -> bool:
    stacked = isinstance(getattr(module, "down_proj", None), nn.Parameter)
    return isinstance(module, GroupedExperts) or (stacked and hasattr(module, "has_gate"))


def _with_lora(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    found = [
        (name, module)
        for name, module in model.named_modules()
        if getattr(module, "expert_lora", None) is not None
    ]
    if not found:
        raise RuntimeError("the model has no expert LoRA; call add_expert_lora() first")
    yield from found


def _gate_is_in_halves(experts: nn.Module) -> bool:
    return isinstance(experts, GroupedExperts) or plain_gate(experts) is not None


def _new_lora(experts: nn.Module, key: str, r: int, alpha: float, dropout: float) -> ExpertLoRA:
    weight_EOI = weight_of(experts, key)
    num_experts, rows, columns = weight_EOI.shape
    like = {"device": weight_EOI.device, "dtype": weight_EOI.dtype}
    return ExpertLoRA(num_experts, columns, rows, r, alpha, dropout, **like)


def _attach(experts: nn.Module, lora: dict[str, ExpertLoRA]) -> None:
    experts.expert_lora = nn.ModuleDict(lora).train(experts.training)
    experts.expert_lora_merged = False
    if not isinstance(experts, GroupedExperts):
        experts.register_forward_pre_hook(_check_implementation)


def _check_implementation(experts: nn.Module, _inputs: tuple) -> None:
    """A forward that knows nothing of our LoRA would leave it out without a word."""
    chosen = experts.config._experts_implementation
    if chosen != "unimoe" and not experts.expert_lora_merged:
        raise RuntimeError(
            f"experts_implementation is {chosen!r}: with expert LoRA it must be 'unimoe'"
        )


def _choose_unimoe(model: nn.Module, found: list[tuple[str, nn.Module]]) -> None:
    if any(not isinstance(experts, GroupedExperts) for _, experts in found):
        register_with_transformers()
        model.set_experts_implementation("unimoe")


def _merge(model: nn.Module, merged: bool) -> nn.Module:
    found = list(_with_lora(model))
    for name, experts in found:
        if experts.expert_lora_merged is merged:
            raise RuntimeError(
                f"the LoRA of {name} is {'merged already' if merged else 'not merged'}"
            )
    for _, experts in found:
        add_deltas(experts, 1.0 if merged else -1.0)
        experts.expert_lora_merged = merged
    return model


def _parameter_order(experts: nn.Module, adapters: dict) -> list[str]:
    return [key for key, _ in experts.named_parameters(recurse=False) if key in adapters]


def _as_peft(lora: nn.ModuleDict) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A, B and scale of each stacked weight; halves of the gate joined, all of one rank."""
    adapters = {
        key: (one.lora_A.detach(), one.lora_B.detach(), one.scale) for key, one in lora.items()
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
    experts: nn.Module, key: str, A: Tensor, B: Tensor, scale: float, dropout: float
) -> ExpertLoRA:
    num_experts, rows, columns = weight_of(experts, key).shape
    rank = A.shape[0] // num_experts
    expected = (num_experts * rank, columns), (rows, num_experts * rank)
    if rank < 1 or (A.shape, B.shape) != expected:
        raise ValueError(
            f"LoRA of {key} (A {tuple(A.shape)}, B {tuple(B.shape)}) must be of {num_experts} "
            f"experts with {rows} rows and {columns} columns"
        )
    lora = _new_lora(experts, key, rank, scale * rank, dropout)
    with torch.no_grad():
        lora.lora_A.copy_(A.view(num_experts, rank, columns))
        lora.lora_B.copy_(B.view(rows, rank, num_experts).permute(2, 0, 1))
    return lora
