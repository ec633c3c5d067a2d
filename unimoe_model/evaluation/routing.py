"""Which experts the tokens of each modality go to, layer by layer."""

from collections.abc import Sequence
from contextlib import contextmanager

import torch

from unimoe_model.configuration import MEDIA_KINDS
from unimoe_model.data.collate import Collator
from unimoe_model.data.examples import Example

MODALITIES = ("text", *MEDIA_KINDS)


@contextmanager
def recorded_routing(model):
    """Collects the chosen experts of every MoE layer while the context is open.

    Yields:
        A dict from layer number to a list of id tensors `[T, K]`, one a forward pass.
    """
    chosen: dict[int, list[torch.Tensor]] = {index: [] for index, _ in model.moe_layers()}
    hooks = [
        moe.router.register_forward_hook(
            lambda _module, _inputs, routed, kept=chosen[index]: kept.append(routed.ids.cpu())
        )
        for index, moe in model.moe_layers()
    ]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def routing_shares(
    model, collator: Collator, examples: Sequence[Example], batch_size: int = 64
) -> dict[str, torch.Tensor]:
    """Share of each modality's tokens that every expert takes.

    Args:
        model: MoE model in eval mode.
        collator: makes its inputs.
        examples: the prompts and answers that are routed.
        batch_size: examples a forward pass.

    Returns:
        For each modality that occurs, `[layers, E]` float64; every row sums to one (each token
        counts once for each of its K experts, divided by K).
    """
    counts = {
        modality: torch.zeros(len(dict(model.moe_layers())), model.config.num_experts)
        for modality in MODALITIES
    }
    for start in range(0, len(examples), batch_size):
        batch = collator.training(examples[start : start + batch_size])
        inputs = {k: v.to(model.device) for k, v in batch.items() if k != "labels"}
        with recorded_routing(model) as chosen:
            model.hidden_states(**inputs)
        kinds = _modality_masks(batch, model.config.media_token_ids)
        for row, ids in enumerate(chosen.values()):
            for modality, mask in kinds.items():
                taken = ids[0][mask.flatten()].flatten().long()
                counts[modality][row] += torch.bincount(taken, minlength=model.config.num_experts)
    return {
        modality: (count / count.sum(1, keepdim=True)).double()
        for modality, count in counts.items()
        if count.sum() > 0
    }


def _modality_masks(
    batch: dict[str, torch.Tensor], media_token_ids: dict[str, int]
) -> dict[str, torch.Tensor]:
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    masks = {kind: ids == token for kind, token in media_token_ids.items()}
    is_media = torch.stack(list(masks.values())).any(0)
    return {"text": real & ~is_media, **masks}
