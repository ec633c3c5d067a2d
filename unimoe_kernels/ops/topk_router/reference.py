"""Specification of `topk_router` and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from unimoe_kernels.ops.topk_router.losses import (
    TINY,
    choices_of,
    counted,
    fractions,
    router_losses,
)


def topk_router(
    logits: Tensor,
    correction_bias: Tensor | None,
    token_mask: Tensor | None,
    top_k: int,
    mode: str,
    num_groups: int,
    top_groups: int,
    scale: float,
    balance: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns scores, ids, tokens_per_expert, load_balancing_loss and router_z_loss."""
    logits_TE = _accumulate(logits)
    choice_TE = _choice(logits_TE, correction_bias, mode, num_groups, top_groups)
    ids_TK = choice_TE.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    scores_TK = _scores(logits_TE, ids_TK, mode) * scale
    losses = router_losses(
        logits_TE, _balanced(ids_TK, balance), token_mask, mode.startswith("sigmoid")
    )
    everyone = counted(logits_TE, None)
    tokens_per_expert = choices_of(ids_TK, everyone, logits_TE.shape[1]).int()
    return scores_TK, ids_TK.int(), tokens_per_expert, *losses


def topk_router_backward(
    grad_scores: Tensor,
    grad_balancing: Tensor,
    grad_z: Tensor,
    logits: Tensor,
    ids: Tensor,
    token_mask: Tensor | None,
    mode: str,
    scale: float,
    balance: str,
) -> Tensor:
    """Returns the gradient of the scores and both losses with respect to the logits."""
    logits_TE, ids_TK = _accumulate(logits), ids.long()
    num_experts = logits_TE.shape[1]
    mask_T = counted(logits_TE, token_mask)
    counted_T1, num_tokens = mask_T.unsqueeze(1), mask_T.sum().clamp(min=1)
    choices_E = choices_of(_balanced(ids_TK, balance), mask_T, num_experts)
    fraction_E = fractions(choices_E, logits_TE.dtype)
    grad_probability_E = grad_balancing * num_experts * fraction_E / num_tokens
    grad_probability_TE = grad_probability_E.expand_as(logits_TE).masked_fill(~counted_T1, 0)
    softmax_TE = logits_TE.softmax(1)
    grad_TK = grad_scores * scale
    if mode.startswith("sigmoid"):
        sigmoid_TE = logits_TE.sigmoid()
        sum_T1 = sigmoid_TE.sum(1, keepdim=True) + TINY
        inner_T1 = (grad_probability_TE * sigmoid_TE / sum_T1).sum(1, keepdim=True)
        grad_sigmoid_TE = (grad_probability_TE - inner_T1) / sum_T1
        if mode == "sigmoid_renorm":
            chosen_TK = sigmoid_TE.gather(1, ids_TK)
            sum_T1 = chosen_TK.sum(1, keepdim=True) + TINY
            inner_T1 = (grad_TK * chosen_TK / sum_T1).sum(1, keepdim=True)
            grad_TK = (grad_TK - inner_T1) / sum_T1
        grad_sigmoid_TE = grad_sigmoid_TE + _spread(grad_TK, ids_TK, logits_TE)
        grad_TE = grad_sigmoid_TE * sigmoid_TE * (1 - sigmoid_TE)
    else:
        if mode == "softmax_topk":
            grad_probability_TE = grad_probability_TE + _spread(grad_TK, ids_TK, logits_TE)
        inner_T1 = (grad_probability_TE * softmax_TE).sum(1, keepdim=True)
        grad_TE = softmax_TE * (grad_probability_TE - inner_T1)
        if mode != "softmax_topk":
            scores_TK = _scores(logits_TE, ids_TK, mode)
            inner_T1 = (grad_TK * scores_TK).sum(1, keepdim=True)
            grad_TE = grad_TE + _spread(scores_TK * (grad_TK - inner_T1), ids_TK, logits_TE)
    slope_T1 = 2 * logits_TE.logsumexp(1, keepdim=True) * (grad_z / num_tokens)
    grad_TE = grad_TE + softmax_TE * slope_T1.masked_fill(~counted_T1, 0)
    return grad_TE.to(logits.dtype)


def _accumulate(logits: Tensor) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()).contiguous()


def _choice(
    logits_TE: Tensor, bias_E: Tensor | None, mode: str, num_groups: int, top_groups: int
) -> Tensor:
    """Returns the values that top-k compares: `-inf` in the groups that a token does not use."""
    choice_TE = logits_TE.sigmoid() if mode.startswith("sigmoid") else logits_TE
    if bias_E is not None:
        choice_TE = logits_TE.softmax(1) if choice_TE is logits_TE else choice_TE
        choice_TE = choice_TE + bias_E.to(choice_TE.dtype)
    if num_groups == top_groups:
        return choice_TE
    grouped_TGE = choice_TE.view(choice_TE.shape[0], num_groups, choice_TE.shape[1] // num_groups)
    # DeepSeek-V2 ranks groups by their best expert; V3, which has the bias, by the best two.
    best = 1 if bias_E is None else min(2, grouped_TGE.shape[2])
    group_TG = grouped_TGE.sort(dim=2, descending=True).values[:, :, :best].sum(2)
    order_TG = group_TG.sort(dim=1, descending=True, stable=True).indices
    used_TG = torch.zeros_like(group_TG, dtype=torch.bool)
    used_TG = used_TG.scatter(1, order_TG[:, :top_groups], True)
    return grouped_TGE.masked_fill(~used_TG.unsqueeze(2), -torch.inf).view_as(choice_TE)


def _scores(logits_TE: Tensor, ids_TK: Tensor, mode: str) -> Tensor:
    if mode == "softmax_topk":
        return logits_TE.softmax(1).gather(1, ids_TK)
    chosen_TK = logits_TE.gather(1, ids_TK)
    if not mode.startswith("sigmoid"):
        # Softmax over all experts, renormalised over the chosen, equals softmax over the chosen.
        return chosen_TK.softmax(1)
    scores_TK = chosen_TK.sigmoid()
    if mode == "sigmoid_renorm":
        scores_TK = scores_TK / (scores_TK.sum(1, keepdim=True) + TINY)
    return scores_TK


def _balanced(ids_TK: Tensor, balance: str) -> Tensor:
    """Returns the choices that the load-balancing loss counts."""
    return ids_TK[:, :1] if balance == "first" else ids_TK


def _spread(values_TK: Tensor, ids_TK: Tensor, like_TE: Tensor) -> Tensor:
    return torch.zeros_like(like_TE).scatter(1, ids_TK, values_TK)
