"""Specification of `unpermute` and its gradient: a weighted gather-sum."""

from __future__ import annotations

import torch
from torch import Tensor


def unpermute(
    rows_ND: Tensor,
    inverse_order: Tensor,
    expert_offsets: Tensor,
    scores_TK: Tensor | None,
    top_k: int,
) -> Tensor:
    """Sums the K rows of each token in choice order, weighted by score."""
    accumulate = torch.float64 if rows_ND.dtype == torch.float64 else torch.float32
    order_TK = inverse_order.view(-1, top_k)
    elsewhere_TK = order_TK >= expert_offsets[-1]
    y_TD = None
    for k in range(top_k):
        chosen_TD = rows_ND.index_select(0, order_TK[:, k]).to(accumulate)
        if scores_TK is not None:
            chosen_TD = chosen_TD * scores_TK[:, k : k + 1].to(accumulate)
        chosen_TD.masked_fill_(elsewhere_TK[:, k : k + 1], 0)
        y_TD = chosen_TD if y_TD is None else y_TD.add_(chosen_TD)
    return y_TD.to(rows_ND.dtype)


def unpermute_backward(
    grad_TD: Tensor,
    rows_ND: Tensor,
    inverse_order: Tensor,
    expert_offsets: Tensor,
    scores_TK: Tensor,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the weighted sum with respect to the rows and the scores."""
    accumulate = torch.float64 if rows_ND.dtype == torch.float64 else torch.float32
    grad_TKD = grad_TD.to(accumulate).unsqueeze(1)
    elsewhere_TK = (inverse_order >= expert_offsets[-1]).view(-1, top_k)
    order_N = inverse_order.long()
    chosen_TKD = rows_ND[order_N].reshape(*scores_TK.shape, rows_ND.shape[1])
    grad_scores_TK = (grad_TKD * chosen_TKD).sum(-1).masked_fill_(elsewhere_TK, 0)
    grad_chosen_TKD = grad_TKD * scores_TK.to(accumulate).unsqueeze(-1)
    grad_chosen_TKD.masked_fill_(elsewhere_TK.unsqueeze(-1), 0)
    grad_rows_ND = rows_ND.new_empty(rows_ND.shape)
    grad_rows_ND[order_N] = grad_chosen_TKD.to(rows_ND.dtype).flatten(0, 1)
    return grad_rows_ND, grad_scores_TK.to(scores_TK.dtype)
