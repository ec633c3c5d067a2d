"""Selects what a stage trains: parameters of parts, and LoRA that is attached for the stage."""

from collections.abc import Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from unimoe_kernels import add_expert_lora
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.training.recipe.parts import TrainedPart


def select_trained(
    model: UniMoEForConditionalGeneration, parts: Sequence[TrainedPart]
) -> dict[str, nn.Parameter]:
    """The parameters that a stage trains, by name; LoRA is attached where parts ask for it.

    Args:
        model: gets the LoRA; its output stays the same until training.
        parts: what is trained.

    Raises:
        ValueError: If a part has nothing to train in this model.
    """
    for part in parts:
        depth = model.config.text_config.num_hidden_layers
        if part.layers and max(part.layers) >= depth:
            raise ValueError(
                f"train ({part.part}): layers ({max(part.layers)}) must be below {depth}, the"
                " number of decoder layers"
            )
        if not any(part.matches(name) for name, _ in model.named_parameters()):
            raise ValueError(f"train ({part.part}) has no parameter in this model")
    whole = {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(part.matches(name) for part in parts if not part.rank)
    }
    for part in parts:
        if part.rank:
            _attach(model, part)
    lora = {name: p for name, p in model.named_parameters() if "lora_" in name}
    # LoRA renames what it lies on, so the names are looked up again.
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: p for p in whole.values()} | lora


def count_trained(
    model: UniMoEForConditionalGeneration, parts: Sequence[TrainedPart]
) -> tuple[int, int]:
    """Numbers that a stage trains, and those of the whole model; the model may be on meta.

    Raises:
        ValueError: If a part has nothing to train in this model.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    return sum(p.numel() for p in select_trained(model, parts).values()), total


def _attach(model: UniMoEForConditionalGeneration, part: TrainedPart) -> None:
    if part.part == "experts":
        add_expert_lora(model, part.rank, part.alpha, part.dropout)
        return
    config = LoraConfig(
        r=part.rank,
        lora_alpha=part.alpha,
        lora_dropout=part.dropout,
        bias="none",
        target_modules=f"({part.linears})",
    )
    with torch.device("meta" if model.device.type == "meta" else "cpu"):
        inject_adapter_in_model(config, model, adapter_name=part.part)
    # peft's mark of a model that has adapters; it warns where it finds one.
    del model.peft_config
