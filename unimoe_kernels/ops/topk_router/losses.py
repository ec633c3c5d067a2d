"""The load-balancing loss and the z-loss of a router, in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Keeps the renormalised sigmoid scores finite when all of them underflow, as DeepSeek-V3 does.
TINY = 1e-20


def router_losses(
    logits: Tensor,
    ids: Tensor,
    token_mask: Tensor | None,
    sigmoid: bool,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The load-balancing loss `E * sum_e f_e * P_e` and the z-loss `mean(logsumexp(logits) ** 2)`.

    `f_e` is the fraction of choices that fall on expert e, `P_e` its mean probability.

    Args:
        logits: `[T, E]`, float32 or float64, of the tokens of this rank.
        ids: `[T, K]`, integer, the choices that count; those of E or more do not.
        token_mask: `[T]`, bool; tokens with False count in neither loss. None means all True.
        sigmoid: whether probabilities are sigmoids divided by their sum, instead of a softmax.
        sum_over_ranks: None, or what adds up int64 `[E + 1]` over all ranks that share a batch.
            Then both losses are this rank's share: `f_e` and the number of tokens are of all ranks,
            and the shares of all ranks add up to the losses of all tokens.

    Returns:
        Two `()`, dtype of logits; 0 without tokens.

    Reference:
        Switch Transformers, arXiv 2101.03961, equation 4; ST-MoE, arXiv 2202.08906, equation 5.
    """
    num_experts, mask_T = logits.shape[1], counted(logits, token_mask)
    counts = torch.cat([choices_of(ids, mask_T, num_experts), mask_T.sum().unsqueeze(0)])
    if sum_over_ranks is not None:
        counts = sum_over_ranks(counts)
    fraction_E, tokens = fractions(counts[:-1], logits.dtype), counts[-1].clamp(min=1)
    probability_TE = probabilities(logits, sigmoid).masked_fill(~mask_T.unsqueeze(1), 0)
    balancing = num_experts * (fraction_E * (probability_TE.sum(0) / tokens)).sum()
    z_T = logits.logsumexp(1).square().masked_fill(~mask_T, 0)
    return balancing, z_T.sum() / tokens


def counted(logits: Tensor, token_mask: Tensor | None) -> Tensor:
    """Returns which tokens the losses count, `[T]` bool."""
    return torch.ones_like(logits[:, 0], dtype=torch.bool) if token_mask is None else token_mask


def choices_of(ids: Tensor, mask_T: Tensor, num_experts: int) -> Tensor:
    """Returns how many choices of the tokens that count fall on each expert, `[E]` int64."""
    left_out = ~mask_T.unsqueeze(1) | (ids >= num_experts)
    place = ids.long().masked_fill(left_out, num_experts).flatten()
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    return counts.scatter_add(0, place, torch.ones_like(place))[:-1]


def fractions(choices_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the share of all choices that each expert has; 0 where there are none."""
    return choices_E.to(dtype) / choices_E.sum().clamp(min=1)


def probabilities(logits: Tensor, sigmoid: bool) -> Tensor:
    """Returns `[T, E]` probabilities: a softmax, or sigmoids divided by their sum."""
    if not sigmoid:
        return logits.softmax(1)
    sigmoid_TE = logits.sigmoid()
    return sigmoid_TE / (sigmoid_TE.sum(1, keepdim=True) + TINY)
