"""Triton kernels of `expert_sort`: a counting sort without atomics.

Each block counts its ids by expert; an exclusive scan over (expert, block) gives every block the
position where its rows of each expert start; each block then places its rows by their rank among
the earlier rows of the same expert. The order of rows is kept, so the result is the same every
run. A last bucket, number `num_experts`, takes the rows that belong to another rank.

Few rows are one block's work: then one launch does all of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # ids a program
SMALL_ROWS = 1024  # up to which one program sorts alone, not tuned on a GPU
CHUNK = 16  # buckets compared at a time: BLOCK * CHUNK comparisons are held in registers


@triton.jit
def _load_buckets(ids_ptr, row, num_rows, num_experts):
    bucket = tl.load(ids_ptr + row, mask=row < num_rows, other=num_experts)
    return tl.where((bucket < 0) | (bucket > num_experts), num_experts, bucket)


@triton.jit(do_not_specialize=["num_rows"])
def count_kernel(
    ids_ptr, counts_ptr, num_rows, num_experts, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """Writes `counts[bucket, block]`."""
    block = tl.program_id(0)
    num_blocks = tl.num_programs(0)
    row = block * BLOCK + tl.arange(0, BLOCK)
    bucket = _load_buckets(ids_ptr, row, num_rows, num_experts)
    for first in range(0, num_experts + 1, CHUNK):
        candidate = first + tl.arange(0, CHUNK)
        hit = (bucket[:, None] == candidate[None, :]) & (row < num_rows)[:, None]
        count = tl.sum(hit.to(tl.int32), axis=0)
        address = candidate.to(tl.int64) * num_blocks + block
        tl.store(counts_ptr + address, count, mask=candidate <= num_experts)


@triton.jit(do_not_specialize=["num_rows"])
def place_kernel(
    ids_ptr,
    ends_ptr,
    counts_ptr,
    row_order_ptr,
    inverse_order_ptr,
    num_rows,
    num_experts,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Writes each row of the block to its sorted position; `ends` is the scan of `counts`."""
    block = tl.program_id(0)
    num_blocks = tl.num_programs(0)
    row = block * BLOCK + tl.arange(0, BLOCK)
    bucket = _load_buckets(ids_ptr, row, num_rows, num_experts)
    position = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(0, num_experts + 1, CHUNK):
        candidate = first + tl.arange(0, CHUNK)
        known = candidate <= num_experts
        address = candidate.to(tl.int64) * num_blocks + block
        start = tl.load(ends_ptr + address, mask=known, other=0)
        start -= tl.load(counts_ptr + address, mask=known, other=0)
        hit = (bucket[:, None] == candidate[None, :]).to(tl.int32)
        rank = tl.cumsum(hit, axis=0) - 1
        position += tl.sum(hit * (rank + start[None, :]), axis=1)
    tl.store(row_order_ptr + position, row, mask=row < num_rows)
    tl.store(inverse_order_ptr + row, position, mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def sort_small_kernel(
    ids_ptr,
    row_order_ptr,
    inverse_order_ptr,
    tokens_per_expert_ptr,
    offsets_ptr,
    num_rows,
    num_experts,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Sorts at most `BLOCK` rows in one program."""
    row = tl.arange(0, BLOCK)
    bucket = _load_buckets(ids_ptr, row, num_rows, num_experts)
    position = tl.zeros((BLOCK,), dtype=tl.int32)
    earlier = tl.zeros((1,), dtype=tl.int32)
    for first in range(0, num_experts + 1, CHUNK):
        candidate = first + tl.arange(0, CHUNK)
        hit = (bucket[:, None] == candidate[None, :]) & (row < num_rows)[:, None]
        hit = hit.to(tl.int32)
        count = tl.sum(hit, axis=0)
        start = earlier + tl.cumsum(count, axis=0) - count
        rank = tl.cumsum(hit, axis=0) - 1
        position += tl.sum(hit * (rank + start[None, :]), axis=1)
        tl.store(offsets_ptr + candidate, start, mask=candidate <= num_experts)
        tl.store(tokens_per_expert_ptr + candidate, count, mask=candidate < num_experts)
        earlier += tl.sum(count, axis=0)
    tl.store(row_order_ptr + position, row, mask=row < num_rows)
    tl.store(inverse_order_ptr + row, position, mask=row < num_rows)


def expert_sort(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sorts flat int32 ids `[N]`; see `ops/expert_sort/op.py`."""
    num_rows = ids.numel()
    row_order, inverse_order = torch.empty_like(ids), torch.empty_like(ids)
    if num_rows == 0:
        zeros = ids.new_zeros(num_experts + 1)
        return row_order, inverse_order, ids.new_zeros(num_experts), zeros
    if num_rows <= SMALL_ROWS:
        tokens_per_expert, offsets = ids.new_empty(num_experts), ids.new_empty(num_experts + 1)
        block = max(64, triton.next_power_of_2(num_rows))
        with torch.cuda.device_of(ids):
            sort_small_kernel[(1,)](
                ids,
                row_order,
                inverse_order,
                tokens_per_expert,
                offsets,
                num_rows,
                num_experts,
                BLOCK=block,
                CHUNK=CHUNK,
                num_warps=max(4, block // 128),
            )
        return row_order, inverse_order, tokens_per_expert, offsets
    num_blocks = triton.cdiv(num_rows, BLOCK)
    counts = ids.new_empty(num_experts + 1, num_blocks)
    offsets = ids.new_zeros(num_experts + 1)
    with torch.cuda.device_of(ids):
        count_kernel[(num_blocks,)](ids, counts, num_rows, num_experts, BLOCK=BLOCK, CHUNK=CHUNK)
        ends = counts.view(-1).cumsum(0, dtype=torch.int32).view_as(counts)
        place_kernel[(num_blocks,)](
            ids,
            ends,
            counts,
            row_order,
            inverse_order,
            num_rows,
            num_experts,
            BLOCK=BLOCK,
            CHUNK=CHUNK,
        )
        offsets[1:] = ends[:-1, -1]
        return row_order, inverse_order, offsets.diff(), offsets
