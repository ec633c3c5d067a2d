"""Loading adapters into the existing expert LoRA of a model, as when training is resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from unimoe_kernels.integrations.model_experts import with_lora
from unimoe_kernels.integrations.peft_adapter import read_files, take_experts
from unimoe_kernels.layers.expert_lora import HALVES, ExpertLoRA

Reloaded = list[tuple[ExpertLoRA, Tensor, Tensor]]


def read_again(model: nn.Module, folder: Path) -> Reloaded:
    """Reads the adapter in a folder for the expert LoRA of a model; the model is not changed.

    Args:
        model: a model with expert LoRA.
        folder: a folder that `write_adapter` wrote for such a model.

    Returns:
        The LoRA of each target, with the A and B in the folder.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If targets, ranks or scales differ from those of the model.
        RuntimeError: If the LoRA of the model is merged.
    """
    config, tensors = read_files(folder)
    found: Reloaded = []
    for name, experts in with_lora(model):
        if experts.expert_lora.is_merged:
            raise RuntimeError(f"the LoRA of {name} is merged: unmerge it before loading another")
        saved = take_experts(folder, config, tensors, name, experts)
        try:
            found += _matched(experts.expert_lora, saved)
        except ValueError as error:
            raise ValueError(f"folder ({folder}): LoRA of {name}: {error}") from error
    return found


def _matched(own: Mapping[str, ExpertLoRA], saved: dict[str, ExpertLoRA]) -> Iterator[tuple]:
    """Splits gate halves that `write_adapter` joined."""
    halves = any(key in own for key in HALVES)
    targets = {"gate_up_proj" if key in HALVES else key: lora for key, lora in own.items()}
    expected = {k: (lora.rank * (1 + halves), lora.scale) for k, lora in targets.items()}
    given = {key: (lora.rank, lora.scale) for key, lora in saved.items()}
    if given != expected:
        raise ValueError(f"targets with rank and scale ({given}) must be {expected}")
    rest = {key: lora.lora_B.detach() for key, lora in saved.items()}
    for key, lora in own.items():
        target, half = ("gate_up_proj", HALVES.index(key)) if key in HALVES else (key, 0)
        ranks = slice(half * lora.rank, (half + 1) * lora.rank)
        rows = rest[target].chunk(2, dim=1)[half] if key in HALVES else rest[target]
        lora_B = rows[:, :, ranks].clone()
        rows[:, :, ranks].zero_()
        yield lora, saved[target].lora_A.detach()[:, ranks], lora_B
    if any(left.any() for left in rest.values()):
        raise ValueError(f"gate and up must have separate LoRA of rank {expected}")
