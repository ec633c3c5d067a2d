"""What becomes of a router's top-k choice: other scores, fewer experts, no more than have room."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from unimoe_kernels.ops import expert_sort

# Keeps a probability finite when all sigmoids of a token underflow, as `topk_router` does.
_TINY = 1e-20


def sparsemixer_scores(logits: Tensor, ids: Tensor, eps: float) -> Tensor:
    """How far ahead of its close rivals each chosen expert is.

    The score of choice k is its share of a softmax over the experts that no earlier choice took and
    whose logit lies within `2 * eps` of its own, relative to the larger of the two magnitudes.
    Without such rivals it is 1.

    Args:
        logits: `[T, E]`, floating point.
        ids: `[T, K]`, int64, the experts in falling order of their logits.
        eps: at least 0.

    Returns:
        `[T, K]`, dtype of logits; differentiable in them.

    Reference:
        SparseMixer, arXiv 2310.00811, as Phi-3.5-MoE (arXiv 2404.14219) uses it without sampling.
    """
    magnitude_TE = logits.detach().abs()
    free_TE, scores = logits, []
    for ids_T1 in ids.split(1, dim=1):
        own_T1 = logits.detach().gather(1, ids_T1)
        distance_TE = (own_T1 - logits.detach()) / magnitude_TE.maximum(own_T1.abs())
        rivals_TE = free_TE.masked_fill(distance_TE > 2 * eps, -torch.inf)
        scores.append(rivals_TE.softmax(1).gather(1, ids_T1))
        free_TE = free_TE.scatter(1, ids_T1, -torch.inf)
    return torch.cat(scores, dim=1)


def within_top_p(logits: Tensor, ids: Tensor, top_p: float) -> Tensor:
    """Which choices a token needs until its experts hold `top_p` of the probability.

    Args:
        logits: `[T, E]`, floating point.
        ids: `[T, K]`, int64, the experts in falling order of their logits.
        top_p: above 0 and at most 1.

    Returns:
        `[T, K]`, bool; the first choice is always True.

    Reference:
        Harder Tasks Need More Experts, arXiv 2403.07652.
    """
    probability_TK = logits.detach().softmax(1).gather(1, ids)
    before_TK = F.pad(probability_TK.cumsum(1)[:, :-1], (1, 0))
    return before_TK < top_p


def within_capacity(
    ids: Tensor, num_experts: int, capacity: int, token_mask: Tensor | None
) -> Tensor:
    """Which choices find room when every expert answers at most `capacity` rows.

    First choices of all tokens are served before second ones, each in order of the tokens.

    Args:
        ids: `[T, K]`, integer; ids of num_experts or more need no room.
        num_experts: E.
        capacity: rows an expert answers.
        token_mask: `[T]`, bool; tokens with False find no room. None means all True.

    Returns:
        `[T, K]`, bool.

    Reference:
        GShard, arXiv 2006.16668, section 2.2.
    """
    num_tokens, top_k = ids.shape
    if token_mask is not None:
        ids = ids.masked_fill(~token_mask.unsqueeze(1), num_experts)
    ids_KT = ids.t()
    sort = expert_sort(ids_KT, num_experts)
    starts_KT = sort.expert_offsets[ids_KT.clamp(max=num_experts)]
    position_KT = sort.inverse_order.view(top_k, num_tokens) - starts_KT
    keep_TK = ((position_KT < capacity) | (ids_KT >= num_experts)).t()
    return keep_TK if token_mask is None else keep_TK & token_mask.unsqueeze(1)


def expert_capacity(num_rows: int, num_experts: int, factor: float, minimum: int) -> int:
    """Rows an expert has room for: `max(ceil(num_rows / num_experts * factor), minimum)`."""
    return max(math.ceil(num_rows * factor / num_experts), minimum)


def load_balancing_loss(logits: Tensor, ids: Tensor, token_mask: Tensor | None) -> Tensor:
    """`E * sum_e f_e * P_e` over as many choices as each token keeps.

    Args:
        logits: `[T, E]`, floating point.
        ids: `[T, K]`, integer; ids of E or more count as no choice.
        token_mask: `[T]`, bool; tokens with False do not count. None means all True.

    Returns:
        `()`, dtype of logits: `f_e` is expert e's share of all choices, `P_e` its mean softmax
        probability. 0 without tokens.

    Reference:
        Switch Transformers, arXiv 2101.03961, equation 4.
    """
    num_experts = logits.shape[1]
    if token_mask is None:
        token_mask = torch.ones_like(logits[:, 0], dtype=torch.bool)
    left_out_T1 = ~token_mask.unsqueeze(1)
    kept_ids = ids.masked_fill(left_out_T1, num_experts)
    rows_E = expert_sort(kept_ids, num_experts).tokens_per_expert.to(logits.dtype)
    probability_TE = logits.softmax(1).masked_fill(left_out_T1, 0)
    mean_E = probability_TE.sum(0) / token_mask.sum().clamp(min=1)
    return num_experts * (rows_E / rows_E.sum().clamp(min=1) * mean_E).sum()


def shares_of_losses(
    logits: Tensor,
    ids: Tensor,
    token_mask: Tensor | None,
    sigmoid: bool,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """This rank's shares of the load-balancing loss and the z-loss of the tokens of all ranks.

    The load-balancing loss is linear in the probabilities once the counts are known, so that only
    counts travel: `E * sum_e f_e * S_e / T` with f_e and T of all ranks and S_e the sum of this
    rank's probabilities.

    Args:
        logits: `[T, E]`, floating point, of this rank's tokens.
        ids: `[T, K]`, integer, the choices that count; ids of E or more do not.
        token_mask: `[T]`, bool; tokens with False do not count. None means all True.
        sigmoid: whether probabilities are sigmoids divided by their sum, instead of a softmax.
        sum_over_ranks: adds up integers `[E + 1]` over all ranks.

    Returns:
        Two `()`, dtype of logits. All ranks' shares add up to the losses of `topk_router`.

    Reference:
        Switch Transformers, arXiv 2101.03961, equation 4; ST-MoE, arXiv 2202.08906, equation 5.
    """
    num_experts = logits.shape[1]
    if token_mask is None:
        token_mask = torch.ones_like(logits[:, 0], dtype=torch.bool)
    left_out_T1 = ~token_mask.unsqueeze(1)
    rows_E = expert_sort(ids.masked_fill(left_out_T1, num_experts), num_experts).tokens_per_expert
    counts = sum_over_ranks(torch.cat([rows_E.long(), token_mask.sum().unsqueeze(0)]))
    rows_E, tokens = counts[:-1].to(logits.dtype), counts[-1].clamp(min=1)
    if sigmoid:
        probability_TE = logits.sigmoid()
        probability_TE = probability_TE / (probability_TE.sum(1, keepdim=True) + _TINY)
    else:
        probability_TE = logits.softmax(1)
    sum_E = probability_TE.masked_fill(left_out_T1, 0).sum(0)
    balancing = num_experts * (rows_E / rows_E.sum().clamp(min=1) * sum_E).sum() / tokens
    z_T = logits.logsumexp(1).square().masked_fill(~token_mask, 0)
    return balancing, z_T.sum() / tokens
