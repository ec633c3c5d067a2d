"""A loss that aligns soft tokens with the embeddings of the answer's words, without the LLM."""

import torch
from torch import nn
from torch.nn import functional as F

from unimoe_model.tokenization import IGNORED

SHARPNESS = 20.0
"""Factor of the cosines before the softmax."""
LENGTH_WEIGHT = 0.1


def word_loss(
    model: nn.Module, batch: dict[str, torch.Tensor], count: torch.Tensor | None = None
) -> torch.Tensor:
    """Predicts the tokens of each row's answer, in any order, from the row's soft tokens.

    A connector whose soft tokens mean nothing to the LLM first learns to output what the LLM
    ignores. Near the embeddings of words, soft tokens have a meaning from the start, and the
    connector learns which words without running the LLM.

    The loss is the cross entropy of the answer's tokens, except end tokens, under a softmax over
    the vocabulary. The logit of a token is `SHARPNESS` times the mean cosine similarity between its
    embedding and the row's soft tokens, both relative to the mean embedding. A second term is
    `LENGTH_WEIGHT` times the mean squared relative difference between the distance of soft tokens
    from the mean embedding and the average distance of embeddings from it.

    Args:
        model: a model with `input_embeddings(**inputs)`, an embedding table, for which no gradient
            is computed, and the configuration of a Uni-MoE.
        batch: inputs and labels; each row holds one sample with media.
        count: divisor of the sum; by default the number of answer tokens in the batch, including
            end tokens.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If a row has no media.
    """
    table = model.get_input_embeddings().weight.detach()
    table = table.to(torch.promote_types(table.dtype, torch.float32))
    mean = table.mean(0)
    lengths = (table - mean).norm(dim=1)
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "attention_mask", "token_mask")}
    ids, labels = batch["input_ids"], batch["labels"]
    is_media = torch.isin(ids, ids.new_tensor(list(model.config.media_token_ids.values())))
    held = is_media.sum(1)
    if not held.all():
        row = held.argmin().item()
        raise ValueError(f"objective (words) requires media in every sample; row {row} has none")
    soft = model.input_embeddings(**inputs).to(table.dtype) - mean
    directions = F.normalize(soft, dim=-1) * is_media[..., None]
    directions = directions.sum(1) / held[:, None]
    cosines = (directions @ table.T - (directions @ mean)[:, None]) / lengths.clamp(min=1e-6)
    logits = (SHARPNESS * cosines).log_softmax(-1)
    wanted = labels != IGNORED
    wanted &= ~torch.isin(labels, labels.new_tensor(_stops(model)))
    rows, columns = wanted.nonzero(as_tuple=True)
    loss = -logits[rows, labels[rows, columns]].sum()
    loss = loss / ((labels[:, 1:] != IGNORED).sum() if count is None else count)
    difference = soft.norm(dim=-1)[is_media] / lengths.mean() - 1
    return loss + LENGTH_WEIGHT * difference.square().mean()


def _stops(model: nn.Module) -> list[int]:
    ids = model.config.text_config.eos_token_id
    return [i for i in (ids if isinstance(ids, list | tuple) else [ids]) if i is not None]
