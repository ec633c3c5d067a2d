"""`expert_sort` for torch's transforms: no in-place writes and no `searchsorted`."""

from __future__ import annotations

import torch
from torch import Tensor


def expert_sort(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sorts the flat ids `[N]` stably; ids outside `[0, num_experts)` come last."""
    sentinel_N = (ids < 0) | (ids >= num_experts)
    sorted_N, order_N = ids.masked_fill(sentinel_N, num_experts).sort(stable=True)
    bound_E1 = torch.arange(num_experts + 1, dtype=torch.int32, device=ids.device)
    offsets = (sorted_N < bound_E1.unsqueeze(1)).sum(1, dtype=torch.int32)
    return order_N.int(), order_N.argsort().int(), offsets.diff(), offsets
