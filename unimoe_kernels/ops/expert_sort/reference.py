"""Specification of `expert_sort`: a stable sort by expert id."""

from __future__ import annotations

import torch
from torch import Tensor


def expert_sort(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sorts the flat ids `[N]` stably; ids outside `[0, num_experts)` come last."""
    sentinel = (ids < 0) | (ids >= num_experts)
    sorted_ids, order = ids.masked_fill(sentinel, num_experts).sort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(ids.numel(), device=ids.device)
    bounds = torch.arange(num_experts + 1, dtype=ids.dtype, device=ids.device)
    offsets = torch.searchsorted(sorted_ids, bounds, out_int32=True)
    return order.int(), inverse.int(), offsets.diff(), offsets
