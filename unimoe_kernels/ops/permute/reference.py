"""Specification of `permute`: an indexed read of token rows."""

from __future__ import annotations

import torch
from torch import Tensor


def permute(x_TD: Tensor, inverse_order: Tensor, expert_offsets: Tensor, top_k: int) -> Tensor:
    """Copies the token of each sorted row; rows past `expert_offsets[-1]` are zero."""
    if x_TD.shape[0] == 0:
        return x_TD.new_zeros(inverse_order.shape[0], x_TD.shape[1])
    row_order = inverse_order.argsort()
    out_ND = x_TD.index_select(0, row_order // top_k)
    elsewhere_N = torch.arange(len(row_order), device=x_TD.device) >= expert_offsets[-1]
    return out_ND.masked_fill_(elsewhere_N.unsqueeze(1), 0)
