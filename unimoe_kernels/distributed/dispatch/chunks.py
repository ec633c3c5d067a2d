"""Division of the rows of a dispatch into chunks, and the order in which they are sent."""

from __future__ import annotations

import torch
from torch import Tensor

from unimoe_kernels.ops import ExpertSort


def cut_evenly(counts_RE: Tensor, num_chunks: int) -> Tensor:
    """Divides the rows that each rank receives into chunks of equal size, up to rounding.

    The rows that a rank receives are divided in expert order, so that a chunk has few experts. If
    a boundary is inside an expert, every sender splits its rows of this expert in the same
    proportion.

    Example:
        >>> cut_evenly(torch.tensor([[4, 2], [2, 0]]), 2).tolist()  # two ranks, an expert each
        [[[2, 1], [1, 0]], [[2, 1], [1, 0]]]

    Args:
        counts_RE: `[ranks, E]`, int64 on the CPU, rows of each rank for each expert; rank r holds
            experts `r * E / ranks` to `(r + 1) * E / ranks - 1`.
        num_chunks: C, at least 1.

    Returns:
        `[C, ranks, E]`, int64. Of n rows, a rank receives at most `ceil(n / C) + ranks - 1` in one
        chunk.
    """
    ranks = len(counts_RE)
    count_PL = counts_RE.sum(0).view(ranks, -1)
    end_PL = count_PL.cumsum(1)
    # [C + 1, P, 1]: boundaries in the rows that a rank receives
    cut_C11 = torch.arange(num_chunks + 1, device=counts_RE.device).view(-1, 1, 1)
    cut_CP1 = end_PL[:, -1:] * cut_C11 // num_chunks
    before_CPL = (cut_CP1 - (end_PL - count_PL)).clamp(min=0).minimum(count_PL)
    before_C1E, count_E = before_CPL.flatten(1).unsqueeze(1), count_PL.flatten().clamp(min=1)
    return ((counts_RE * before_C1E + count_E - 1) // count_E).diff(dim=0)


def order_by_chunk(sort: ExpertSort, counts_CE: Tensor) -> ExpertSort:
    """Sorts rows stably by chunk, and within a chunk by expert.

    Args:
        sort: all rows sorted by expert.
        counts_CE: `[C, E]`, int64 on the CPU, rows of each expert in each chunk; their sum over
            chunks is that of `sort`.

    Returns:
        `sort` in the new order; rows of no expert remain at the end.
    """
    device, num_rows = sort.row_order.device, sort.row_order.numel()
    count_E = counts_CE.sum(0)
    starts_CE = count_E.cumsum(0) - count_E + counts_CE.cumsum(0) - counts_CE
    # Rows of no expert are a separate piece.
    taken = int(count_E.sum())
    lengths = torch.cat([counts_CE.flatten(), counts_CE.new_tensor([num_rows - taken])])
    starts = torch.cat([starts_CE.flatten(), starts_CE.new_tensor([taken])])
    moved = starts - (lengths.cumsum(0) - lengths)
    moved_N = moved.to(device).repeat_interleave(lengths.to(device), output_size=num_rows)
    position_N = torch.arange(num_rows, device=device) + moved_N
    place_N = torch.empty_like(sort.inverse_order)
    place_N[position_N] = torch.arange(num_rows, dtype=place_N.dtype, device=device)
    return sort._replace(
        row_order=sort.row_order[position_N], inverse_order=place_N[sort.inverse_order.long()]
    )
