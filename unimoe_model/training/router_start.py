"""Initialisation of routers from the mean hidden states of each modality."""

from collections.abc import Iterable

import torch

from unimoe_model.modeling import UniMoEForConditionalGeneration


@torch.inference_mode()
def mean_ffn_inputs(
    model: UniMoEForConditionalGeneration, batches: Iterable[dict[str, torch.Tensor]]
) -> torch.Tensor:
    """Mean input of every layer's FFN over all tokens except for padding.

    Args:
        model: dense model; switched to eval mode.
        batches: model inputs with `attention_mask`; labels are ignored.

    Returns:
        `[layers, D]` float32 on the CPU.
    """
    model.eval()
    layers = model.model.language_model.layers
    sums = torch.zeros(len(layers), model.config.text_config.hidden_size)
    tokens = 0
    for batch in batches:
        given: list[torch.Tensor] = []
        hooks = [
            layer.mlp.register_forward_pre_hook(
                lambda _, inputs, kept=given: kept.append(inputs[0])
            )
            for layer in layers
        ]
        try:
            inputs = {k: v.to(model.device) for k, v in batch.items() if k != "labels"}
            model.hidden_states(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
        real = inputs["attention_mask"].bool()
        sums += torch.stack([x[real].float().sum(0).cpu() for x in given])
        tokens += int(real.sum())
    return sums / max(tokens, 1)


def router_weights(means: torch.Tensor, strength: float) -> torch.Tensor:
    """Router weights that route a modality's mean token to its own expert.

    The weight of expert e is the difference between its modality's mean and the mean over all
    modalities, made orthogonal to the latter, so that no expert is preferred for what modalities
    have in common. Its length is such that the logit of the modality's mean is `strength`.

    Args:
        means: `[E, layers, D]` float32, one mean per modality and layer.
        strength: logit of a modality's mean token for its own expert.

    Returns:
        `[layers, E, D]` float32.

    Reference: the "hidden" gate mode of mergekit's MoE merging.
    """
    common = means.mean(0, keepdim=True)
    axis = common / common.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    own = means - common
    own = own - (own * axis).sum(-1, keepdim=True) * axis
    weights = strength * own / own.square().sum(-1, keepdim=True).clamp_min(1e-12)
    return weights.transpose(0, 1).contiguous()
