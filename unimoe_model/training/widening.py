"""Widening of dense FFNs with unchanged outputs."""

import torch

from unimoe_model.configuration import UniMoEConfig
from unimoe_model.modeling import UniMoEForConditionalGeneration


def widened(width: int, times: float) -> int:
    """Width of an FFN that is `times` as wide, rounded to an integer."""
    return round(times * width)


@torch.no_grad()
def widen_ffns(
    model: UniMoEForConditionalGeneration, times: float
) -> UniMoEForConditionalGeneration:
    """Builds a dense model with FFNs `times` as wide and equal outputs.

    The units of every FFN are repeated in their order up to the new width, and the output of a unit
    is divided by the number of its copies, which stay equal until something that distinguishes them
    is trained, such as LoRA on `down_proj`.

    Args:
        model: dense model, which is not changed.
        times: factor of the width, at least 1; the new width is rounded to an integer.

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
    own = fields["text_config"]["intermediate_size"]
    fields["text_config"]["intermediate_size"] = width = widened(own, times)
    units = torch.arange(width, device=model.device) % own
    copies = units.bincount(minlength=own)
    wide = UniMoEForConditionalGeneration(UniMoEConfig.from_dict(fields))
    state = model.state_dict()
    for index in range(len(model.model.language_model.layers)):
        prefix = f"model.language_model.layers.{index}.mlp."
        for name in ("gate_proj", "up_proj"):
            state[f"{prefix}{name}.weight"] = state[f"{prefix}{name}.weight"][units]
        down = f"{prefix}down_proj.weight"
        state[down] = (state[down] / copies)[:, units]
    wide.load_state_dict(state)
    return wide.to(model.device, model.dtype)
