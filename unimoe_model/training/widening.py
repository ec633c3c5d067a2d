"""Widening of dense FFNs with unchanged outputs."""

import torch

from unimoe_model.configuration import UniMoEConfig
from unimoe_model.modeling import UniMoEForConditionalGeneration


@torch.no_grad()
def widen_ffns(model: UniMoEForConditionalGeneration, times: int) -> UniMoEForConditionalGeneration:
    """Builds a dense model with FFNs `times` as wide and equal outputs.

    Every FFN is repeated `times` side by side, with outputs divided by `times`. The copies of a
    unit stay equal until something that distinguishes them is trained, such as LoRA on
    `down_proj`.

    Args:
        model: dense model, which is not changed.
        times: factor of the width, at least 1.

    Returns:
        A new model on the same device, in the same dtype.

    Raises:
        ValueError: If `times` is below 1, or the model has MoE layers.

    Reference: Chen et al., "Net2Net", arXiv 1511.05641.
    """
    if times < 1:
        raise ValueError(f"times ({times}) must be at least 1")
    if model.config.num_experts:
        raise ValueError(f"model has num_experts ({model.config.num_experts}), expected 0")
    fields = model.config.to_dict()
    fields["text_config"]["intermediate_size"] *= times
    wide = UniMoEForConditionalGeneration(UniMoEConfig.from_dict(fields))
    state = model.state_dict()
    for index in range(len(model.model.language_model.layers)):
        prefix = f"model.language_model.layers.{index}.mlp."
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            weight = state[f"{prefix}{name}.weight"]
            if name == "down_proj":
                weight = weight / times
            state[f"{prefix}{name}.weight"] = torch.cat([weight] * times, dim)
    wide.load_state_dict(state)
    return wide.to(model.device, model.dtype)
