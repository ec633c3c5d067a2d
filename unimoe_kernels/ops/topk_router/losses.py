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
    """Returns the load-balancing loss and the z-loss of a router.

    The load-balancing loss is `E * sum_e f_e * P_e`, where `f_e` is the fraction of choices that
    fall on expert e and `P_e` its mean probability. The z-loss is `mean(logsumexp(logits) ** 2)`.

    Args:
        logits: `[T, E]`, float32 or float64, of the tokens of this rank.
        ids: `[T, K]`, integer, the choices to count; ids of E or more are not counted.
        token_mask: `[T]`, bool; tokens with False are excluded from both losses. None means all
            True.
        sigmoid: Whether probabilities are sigmoids divided by their sum rather than a softmax.
        sum_over_ranks: None, or a function that sums int64 `[E + 1]` over all ranks that share a
            batch. Both losses are then this rank's share: `f_e` and the number of tokens are those
            of all ranks, and the shares of all ranks sum to the losses of all tokens.

    Returns:
        Two scalars in the dtype of `logits`; 0 without tokens.

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
    """Returns a mask `[T]`, bool, of the tokens that the losses include."""
    return torch.ones_like(logits[:, 0], dtype=torch.bool) if token_mask is None else token_mask


def choices_of(ids: Tensor, mask_T: Tensor, num_experts: int) -> Tensor:
    """Returns the number of choices of each expert, `[E]` int64, over the tokens in `mask_T`."""
    left_out = ~mask_T.unsqueeze(1) | (ids >= num_experts)
    place = ids.long().masked_fill(left_out, num_experts).flatten()
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    return counts.scatter_add(0, place, torch.ones_like(place))[:-1]


def fractions(choices_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns each expert's fraction of all choices; 0 without choices."""
    return choices_E.to(dtype) / choices_E.sum().clamp(min=1)


def probabilities(logits: Tensor, sigmoid: bool) -> Tensor:
    """Returns `[T, E]` probabilities: a softmax, or sigmoids divided by their sum."""
    if not sigmoid:
        return logits.softmax(1)
    sigmoid_TE = logits.sigmoid()
    return sigmoid_TE / (sigmoid_TE.sum(1, keepdim=True) + TINY)
