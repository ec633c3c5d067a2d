"""Post-processing of top-k routing: SparseMixer scores, top-p truncation, expert capacity."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from unimoe_kernels.ops import expert_sort


def sparsemixer_scores(logits: Tensor, ids: Tensor, eps: float) -> Tensor:
    """Returns the SparseMixer scores of the chosen experts.

    The score of choice k is its probability in a softmax over the experts that are not an earlier
    choice and whose logits differ from its own by at most `2 * eps`, relative to the larger of the
    two magnitudes. If there is no other such expert, the score is 1.

    Args:
        logits: `[T, E]`, floating point.
        ids: `[T, K]`, int64, the experts in descending order of their logits.
        eps: at least 0.

    Returns:
        `[T, K]`, dtype of logits; differentiable in `logits`.

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
    """Returns a mask of the fewest leading choices that together reach probability `top_p`.

    Args:
        logits: `[T, E]`, floating point.
        ids: `[T, K]`, int64, the experts in descending order of their logits.
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
    """Returns a mask of the choices within capacity, where an expert has at most `capacity` rows.

    First choices of all tokens come before second ones, each in order of the tokens.

    Args:
        ids: `[T, K]`, integer; ids of num_experts or more have no capacity limit.
        num_experts: E.
        capacity: maximum number of rows per expert.
        token_mask: `[T]`, bool; choices of tokens with False are dropped. None means all True.

    Returns:
        `[T, K]`, bool.

    Reference:
        GShard, arXiv 2006.16668, section 2.2.
    """
    num_tokens, top_k = ids.shape
    if token_mask is not None:
        ids = ids.masked_fill(~token_mask.unsqueeze(1), num_experts)
    ids_KT = ids.t()
    sort = expert_sort(ids_KT, num_experts)  # type: ignore[operator]  # no module, as mypy thinks
    starts_KT = sort.expert_offsets[ids_KT.clamp(max=num_experts)]
    position_KT = sort.inverse_order.view(top_k, num_tokens) - starts_KT
    keep_TK = ((position_KT < capacity) | (ids_KT >= num_experts)).t()
    return keep_TK if token_mask is None else keep_TK & token_mask.unsqueeze(1)


def expert_capacity(num_rows: int, num_experts: int, factor: float, minimum: int) -> int:
    """Returns the rows per expert: `max(ceil(num_rows / num_experts * factor), minimum)`."""
    return max(math.ceil(num_rows * factor / num_experts), minimum)


def share(scores: Tensor) -> Tensor:
    """Divides scores `[T, K]` by their sum over K; a token with all zeros keeps them."""
    sum_T1 = scores.sum(1, keepdim=True)
    return scores / sum_T1.masked_fill(sum_T1 == 0, 1)
