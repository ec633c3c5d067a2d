"""A loss that aligns soft tokens with the embeddings of the answer's words, without the LLM."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from unimoe_model.configuration import MEDIA_KINDS, UniMoEConfig
from unimoe_model.tokenization import IGNORED

SHARPNESS, BAG_SHARPNESS = 20.0, 40.0
"""Factors of the cosines before the softmax, of tokens in order and in any order: the mean of soft
tokens has a smaller cosine with each token of a name than a soft token with its only one."""
LENGTH_WEIGHT = 0.1
_ROWS = 64
"""Number of rows of logits at a time."""


@dataclass(frozen=True)
class Vocabulary:
    """Embeddings of all tokens relative to their mean.

    Attributes:
        mean: `[D]`, the mean embedding, at least float32.
        units: `[V, D]`, the directions of the embeddings from the mean, of length 1.
        length: scalar, the average distance of the embeddings from the mean.
    """

    mean: torch.Tensor
    units: torch.Tensor
    length: torch.Tensor

    @classmethod
    def of(cls, model: nn.Module, dtype: torch.dtype | None = None) -> "Vocabulary":
        """Builds the vocabulary of a model, whose embeddings must not change afterwards.

        Args:
            model: a model with an embedding table.
            dtype: dtype of `units`, that of the matmuls; None for that of `mean`.
        """
        table = model.get_input_embeddings().weight.detach()
        table = table.to(torch.promote_types(table.dtype, torch.float32))
        mean = table.mean(0)
        away = table - mean
        return cls(mean, F.normalize(away, dim=1, eps=1e-6).to(dtype), away.norm(dim=1).mean())


def word_loss(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    count: torch.Tensor | None = None,
    vocabulary: Vocabulary | None = None,
) -> torch.Tensor:
    """Predicts the tokens of each row's answer from the row's soft tokens.

    A connector whose soft tokens mean nothing to the LLM first learns to output what the LLM
    ignores. Near the embeddings of words, soft tokens have a meaning from the start, and the
    connector learns which words without running the LLM.

    Soft tokens of speech and audio come from a sequence of queries: the first predicts the first
    token of the answer, the second the second, and so on. Those after the answer predict its end
    token, and their mean counts as one token. Tokens of a longer answer than the row has queries
    are left out. The same holds for images and videos with `vision_pooled_tokens`. Otherwise their
    soft tokens come from patches, which do not know which token of the answer is theirs: together
    they predict all tokens of the answer, except end tokens, in any order.

    The loss is the cross entropy of these predictions under a softmax over the vocabulary. The
    logit of a token is `SHARPNESS` times the cosine similarity between its embedding and the soft
    token, for images and videos `BAG_SHARPNESS` times the mean over the row's soft tokens, all
    relative to the mean embedding. A second term is `LENGTH_WEIGHT` times the mean squared relative
    difference between the distance of soft tokens from the mean embedding and the average distance
    of embeddings from it.

    Args:
        model: a model with `connector_outputs(**inputs)`, an embedding table, for which no gradient
            is computed, and the configuration of a Uni-MoE.
        batch: inputs and labels; each row holds one sample with media, whose answer has the tokens
            of a text (`answers_within_text`).
        count: divisor of the sum; by default the number of answer tokens in the batch, including
            end tokens.
        vocabulary: that of the model, which takes time to build; None to build it.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If a row has no media.
    """
    vocabulary = vocabulary or Vocabulary.of(model)
    mean, units, length = vocabulary.mean, vocabulary.units, vocabulary.length
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "attention_mask", "token_mask")}
    ids, labels = batch["input_ids"], batch["labels"]
    kinds = model.config.media_token_ids
    is_media = torch.isin(ids, ids.new_tensor(list(kinds.values())))
    if not is_media.any(1).all():
        row = is_media.sum(1).argmin().item()
        raise ValueError(f"objective (words) requires media in every sample; row {row} has none")
    in_order = torch.isin(ids, ids.new_tensor([kinds[kind] for kind in _in_order(model.config)]))
    soft = model.connector_outputs(**inputs).to(mean.dtype) - mean
    directions = F.normalize(soft, dim=-1)
    is_end = torch.isin(labels, labels.new_tensor(_stops(model)))
    is_word = (labels != IGNORED) & ~is_end
    loss = soft.new_zeros(())
    loose = is_media & ~in_order
    if loose.any():
        held = loose.sum(1)
        means = (directions * loose[..., None]).sum(1) / held.clamp(min=1)[:, None]
        rows, columns = (is_word & (held > 0)[:, None]).nonzero(as_tuple=True)
        words = labels[rows, columns]
        weights = torch.ones_like(words)
        loss = loss + _CrossEntropy.apply(means, units, BAG_SHARPNESS, rows, words, weights)
    if in_order.any():
        targets, weights = _targets_in_order(labels, in_order, is_word, is_end)
        rows = torch.arange(len(targets), device=targets.device)
        spelled = directions[in_order]
        loss = loss + _CrossEntropy.apply(spelled, units, SHARPNESS, rows, targets, weights)
    loss = loss / ((labels[:, 1:] != IGNORED).sum() if count is None else count)
    difference = soft.norm(dim=-1)[is_media] / length - 1
    return loss + LENGTH_WEIGHT * difference.square().mean()


class _CrossEntropy(torch.autograd.Function):
    """Weighted sum of cross entropies of tokens under softmaxes of cosine similarities.

    The gradient is computed in the forward, some rows at a time, so that the logits of the whole
    vocabulary are never stored: on a CPU they stay in the cache.
    """

    @staticmethod
    def forward(
        ctx,
        directions: torch.Tensor,
        units: torch.Tensor,
        sharpness: float,
        rows: torch.Tensor,
        tokens: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        # directions [P, D], units [V, D], and [N] each the predictions' rows of directions, which
        # ascend, tokens and weights.
        total = directions.new_zeros(())
        gradient = torch.empty_like(directions)
        weights = weights.to(directions.dtype)
        device = directions.device.type
        if torch.is_autocast_enabled(device):  # converted once, not for each of the matmuls
            units = units.to(torch.get_autocast_dtype(device))
        starts = range(0, len(directions) + _ROWS, _ROWS)
        bounds = torch.searchsorted(rows, rows.new_tensor(starts)).tolist()
        for start, (first, last) in zip(starts, pairwise(bounds), strict=False):
            own = slice(start, start + _ROWS)
            row, token, weight = rows[first:last] - start, tokens[first:last], weights[first:last]
            logits = (directions[own] @ units.T).to(directions.dtype).mul_(sharpness)
            norms = logits.logsumexp(1)
            total += (weight * (norms[row] - logits[row, token])).sum()
            sums = torch.zeros_like(norms).index_add_(0, row, weight)
            shares = logits.sub_(norms[:, None]).exp_().mul_(sums[:, None])
            shares.index_put_((row, token), -weight, accumulate=True)
            gradient[own] = sharpness * (shares @ units)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_of_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradient_of_total, None, None, None, None, None


def _targets_in_order(
    labels: torch.Tensor, in_order: torch.Tensor, is_word: torch.Tensor, is_end: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token that each soft token in order predicts, and the weight of the prediction.

    Args:
        labels: `[B, S]`.
        in_order: `[B, S]` bool, the soft tokens in order; N of them.
        is_word: `[B, S]` bool, labels of the answer without end tokens.
        is_end: `[B, S]` bool, labels that end an answer.

    Returns:
        Targets `[N]`, and weights `[N]`: 0 after an answer that has no end token.
    """
    places = (in_order.cumsum(1) - 1)[in_order]
    rows = in_order.nonzero(as_tuple=True)[0]
    # Words first, in their order.
    words = labels.gather(1, (~is_word).to(torch.int8).argsort(dim=1, stable=True))
    length, held = is_word.sum(1), in_order.sum(1)
    ends = labels.masked_fill(~is_end, IGNORED).amax(1)
    said = words[rows, places.clamp(max=labels.shape[1] - 1)]
    spoken = places < length[rows]
    after = 1 / (held - length).clamp(min=1) * (ends != IGNORED)
    targets = torch.where(spoken, said, ends[rows].clamp(min=0))
    return targets, torch.where(spoken, 1.0, after[rows])


def _in_order(config: UniMoEConfig) -> tuple[str, ...]:
    """Media kinds whose soft tokens have an order: all but those of patches."""
    return ("speech", "audio") if config.vision_pooled_tokens is None else MEDIA_KINDS


def _stops(model: nn.Module) -> list[int]:
    ids = model.config.text_config.eos_token_id
    return [i for i in (ids if isinstance(ids, list | tuple) else [ids]) if i is not None]
