"""The gradient of `unpermute` for torch's transforms, without in-place writes."""

from __future__ import annotations

import torch
from torch import Tensor


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
    grad_scores_TK = (grad_TKD * chosen_TKD).sum(-1).masked_fill(elsewhere_TK, 0)
    grad_chosen_TKD = grad_TKD * scores_TK.to(accumulate).unsqueeze(-1)
    grad_chosen_TKD = grad_chosen_TKD.masked_fill(elsewhere_TK.unsqueeze(-1), 0)
    grad_rows_ND = grad_chosen_TKD.to(rows_ND.dtype).flatten(0, 1)[order_N.argsort()]
    return grad_rows_ND, grad_scores_TK.to(scores_TK.dtype)
