"""Triton kernels of `expert_sort`: a counting sort without atomics, in three launches.

Each block counts its ids by expert; an exclusive scan over the blocks gives the rows of an expert
in earlier blocks; each block then places its rows by their rank among the earlier rows of the same
expert. The sort is stable, so the result is the same every run. A last bucket, number
`num_experts`, holds the rows that belong to another rank.

If the rows fit into one block, a single launch sorts them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unimoe_kernels._triton.planned import Launch, Place, place_of, planned

BLOCK_M = 256  # ids per program
SMALL_ROWS = 1024  # maximum number of rows for a single program; not tuned on a GPU
BLOCK_S = 64  # blocks whose counts are scanned at a time
BLOCK_E = 16  # buckets compared at a time: BLOCK_M * BLOCK_E comparisons are held in registers


@triton.jit
def _load_buckets(ids_ptr, offs_m, num_rows, num_experts):
    bucket_M = tl.load(ids_ptr + offs_m, mask=offs_m < num_rows, other=num_experts)
    bucket_M = tl.where((bucket_M < 0) | (bucket_M > num_experts), num_experts, bucket_M)
    return bucket_M.to(tl.int32)


@triton.jit
def _positions_of(hit_ME, start_E):
    """Returns the sorted positions of rows of some buckets; 0 for rows of other buckets."""
    rank_ME = tl.cumsum(hit_ME, axis=0) - 1
    return tl.sum(hit_ME * (rank_ME + start_E[None, :]), axis=1)


@triton.jit(do_not_specialize=["num_rows"])
def count_kernel(
    ids_ptr, counts_ptr, num_rows, num_experts, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Writes `counts[bucket, program]`."""
    pid_m = tl.program_id(0)
    num_programs_m = tl.num_programs(0)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    bucket_M = _load_buckets(ids_ptr, offs_m, num_rows, num_experts)
    for start_e in range(0, num_experts + 1, BLOCK_E):
        offs_e = start_e + tl.arange(0, BLOCK_E)
        hit_ME = (bucket_M[:, None] == offs_e[None, :]) & (offs_m < num_rows)[:, None]
        count_E = tl.sum(hit_ME.to(tl.int32), axis=0)
        counts_offs_e = offs_e.to(tl.int64) * num_programs_m + pid_m
        tl.store(counts_ptr + counts_offs_e, count_E, mask=offs_e <= num_experts)


@triton.jit(do_not_specialize=["num_blocks"])
def scan_kernel(
    counts_ptr,
    totals_ptr,
    num_blocks,
    num_experts,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Replaces the counts of `BLOCK_E` buckets by their exclusive sums, and writes the totals."""
    offs_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = offs_e <= num_experts
    total_E = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for start_s in range(0, num_blocks, BLOCK_S):
        offs_s = start_s + tl.arange(0, BLOCK_S)
        counts_offs_se = offs_e.to(tl.int64)[None, :] * num_blocks + offs_s[:, None]
        mask_se = (offs_s < num_blocks)[:, None] & mask_e[None, :]
        count_SE = tl.load(counts_ptr + counts_offs_se, mask=mask_se, other=0)
        earlier_SE = total_E[None, :] + tl.cumsum(count_SE, axis=0) - count_SE
        tl.store(counts_ptr + counts_offs_se, earlier_SE, mask=mask_se)
        total_E += tl.sum(count_SE, axis=0)
    tl.store(totals_ptr + offs_e, total_E, mask=mask_e)


@triton.jit(do_not_specialize=["num_rows"])
def place_kernel(
    ids_ptr,
    earlier_ptr,
    totals_ptr,
    row_order_ptr,
    inverse_order_ptr,
    offsets_ptr,
    num_rows,
    num_experts,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Writes each row of the block to its sorted position; the first block writes the offsets."""
    pid_m = tl.program_id(0)
    num_programs_m = tl.num_programs(0)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    bucket_M = _load_buckets(ids_ptr, offs_m, num_rows, num_experts)
    position_M = tl.zeros((BLOCK_M,), dtype=tl.int32)
    before = tl.zeros((1,), dtype=tl.int32)
    for start_e in range(0, num_experts + 1, BLOCK_E):
        offs_e = start_e + tl.arange(0, BLOCK_E)
        mask_e = offs_e <= num_experts
        total_E = tl.load(totals_ptr + offs_e, mask=mask_e, other=0)
        start_E = before + tl.cumsum(total_E, axis=0) - total_E
        written_e = offs_e <= tl.where(pid_m == 0, num_experts, -1)
        tl.store(offsets_ptr + offs_e, start_E, mask=written_e)
        earlier_offs_e = offs_e.to(tl.int64) * num_programs_m + pid_m
        start_E += tl.load(earlier_ptr + earlier_offs_e, mask=mask_e, other=0)
        hit_ME = (bucket_M[:, None] == offs_e[None, :]).to(tl.int32)
        position_M += _positions_of(hit_ME, start_E)
        before += tl.sum(total_E, axis=0)
    tl.store(row_order_ptr + position_M, offs_m, mask=offs_m < num_rows)
    tl.store(inverse_order_ptr + offs_m, position_M, mask=offs_m < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def sort_small_kernel(
    ids_ptr,
    row_order_ptr,
    inverse_order_ptr,
    tokens_per_expert_ptr,
    offsets_ptr,
    num_rows,
    num_experts,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Sorts at most `BLOCK_M` rows in one program."""
    offs_m = tl.arange(0, BLOCK_M)
    bucket_M = _load_buckets(ids_ptr, offs_m, num_rows, num_experts)
    position_M = tl.zeros((BLOCK_M,), dtype=tl.int32)
    earlier = tl.zeros((1,), dtype=tl.int32)
    for start_e in range(0, num_experts + 1, BLOCK_E):
        offs_e = start_e + tl.arange(0, BLOCK_E)
        hit_ME = (bucket_M[:, None] == offs_e[None, :]) & (offs_m < num_rows)[:, None]
        hit_ME = hit_ME.to(tl.int32)
        count_E = tl.sum(hit_ME, axis=0)
        start_E = earlier + tl.cumsum(count_E, axis=0) - count_E
        position_M += _positions_of(hit_ME, start_E)
        tl.store(offsets_ptr + offs_e, start_E, mask=offs_e <= num_experts)
        tl.store(tokens_per_expert_ptr + offs_e, count_E, mask=offs_e < num_experts)
        earlier += tl.sum(count_E, axis=0)
    tl.store(row_order_ptr + position_M, offs_m, mask=offs_m < num_rows)
    tl.store(inverse_order_ptr + offs_m, position_M, mask=offs_m < num_rows)


def expert_sort(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sorts flat ids `[N]`, int32 or int64; see `ops/expert_sort/op.py`."""
    num_rows, dtype = ids.numel(), torch.int32
    row_order, inverse_order = (ids.new_empty(num_rows, dtype=dtype) for _ in range(2))
    if num_rows == 0:
        zeros = ids.new_zeros(num_experts + 1, dtype=dtype)
        return row_order, inverse_order, zeros[1:].clone(), zeros
    offsets = ids.new_empty(num_experts + 1, dtype=dtype)
    place, signature = place_of(ids), (num_rows, num_experts, ids.dtype)
    if num_rows <= SMALL_ROWS:
        tokens_per_expert = ids.new_empty(num_experts, dtype=dtype)
        sort = _small(place, *signature)
        sort(ids, row_order, inverse_order, tokens_per_expert, offsets)
        return row_order, inverse_order, tokens_per_expert, offsets
    counts = ids.new_empty(num_experts + 1, triton.cdiv(num_rows, BLOCK_M), dtype=dtype)
    totals = torch.empty_like(offsets)
    count, scan, move = _in_blocks(place, *signature)
    count(ids, counts)
    scan(counts, totals)
    move(ids, counts, totals, row_order, inverse_order, offsets)
    return row_order, inverse_order, totals[:-1], offsets


# A kernel is compiled for each dtype of ids.
@planned
def _small(place: Place, num_rows: int, num_experts: int, dtype: torch.dtype) -> Launch:
    block_m = max(64, triton.next_power_of_2(num_rows))
    constants = {"BLOCK_M": block_m, "BLOCK_E": BLOCK_E, "num_warps": max(4, block_m // 128)}
    return Launch(place, sort_small_kernel, (1,), (num_rows, num_experts), constants)


@planned
def _in_blocks(
    place: Place, num_rows: int, num_experts: int, dtype: torch.dtype
) -> tuple[Launch, Launch, Launch]:
    num_blocks, sizes = triton.cdiv(num_rows, BLOCK_M), (num_rows, num_experts)
    by_block = {"BLOCK_M": BLOCK_M, "BLOCK_E": BLOCK_E}
    by_bucket = {"BLOCK_S": BLOCK_S, "BLOCK_E": BLOCK_E}
    bucket_grid = (triton.cdiv(num_experts + 1, BLOCK_E),)
    return (
        Launch(place, count_kernel, (num_blocks,), sizes, by_block),
        Launch(place, scan_kernel, bucket_grid, (num_blocks, num_experts), by_bucket),
        Launch(place, place_kernel, (num_blocks,), sizes, by_block),
    )
