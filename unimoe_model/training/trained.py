"""Selection of the parameters that a stage trains, and attachment of LoRA."""

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
    """Attaches LoRA as configured and returns the parameters that a stage trains, by name.

    Args:
        model: model to attach LoRA to; its output is unchanged until training.
        parts: parts to train.

    Raises:
        ValueError: If a part has no parameters in this model, or `layers` exceed its depth.
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
    # LoRA renames the parameters that it wraps, so the names are looked up again.
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: p for p in whole.values()} | lora


def count_trained(
    model: UniMoEForConditionalGeneration, parts: Sequence[TrainedPart]
) -> tuple[int, int]:
    """Counts trained parameters and all parameters of a model, which may be on the meta device.

    Raises:
        ValueError: If a part has no parameters in this model.
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
    # peft marks models that have adapters and warns about the mark at the next injection.
    del model.peft_config
