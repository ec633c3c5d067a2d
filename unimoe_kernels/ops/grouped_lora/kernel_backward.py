"""Triton kernel of the weight gradients of `grouped_lora`: those of A and B in one launch.

Both sum, over the rows of an expert, a row of width D or F times one of width r. A program holds
some of those columns by all r in registers, so that the wide rows are read once. Its columns are
few enough that one expert with all of the rows has tiles for most of a GPU; no sum is split, and so
none has to be put together again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unimoe_kernels._triton.launch import (
    bits_to_float,
    device_of,
    float_bits,
    matmul_constants,
    precision,
)
from unimoe_kernels._triton.tiles import Problem, choose, num_programs, rank_columns, rows_bucket


@triton.jit
def low_rank_gradient(
    rows_ptr,
    low_ptr,
    out_ptr,
    expert,
    column_tile,
    begin,
    end,
    scale,
    width: tl.constexpr,
    rank: tl.constexpr,
    stride_n: tl.constexpr,
    stride_r: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes some columns of `scale * rows.T @ low`, summed over rows from begin to end."""
    column = column_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    low_column, step = tl.arange(0, RANK), tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, RANK), dtype=ACC)
    for first in range(begin, end, BLOCK_K):
        row = first + step
        owned = row < end
        row = row.to(tl.int64)
        # What is past the end belongs to other experts, or is not there at all.
        rows_mask, low_mask = owned[None, :], owned[:, None]
        if width % BLOCK_M != 0:
            rows_mask = rows_mask & (column < width)[:, None]
        if rank != RANK:
            low_mask = low_mask & (low_column < rank)[None, :]
        rows_ptrs = rows_ptr + row[None, :] * width + column[:, None]
        rows = tl.load(rows_ptrs, mask=rows_mask, other=0)
        low_ptrs = low_ptr + row[:, None] * rank + low_column[None, :]
        low = tl.load(low_ptrs, mask=low_mask, other=0)
        if UPCAST:
            rows, low = rows.to(ACC), low.to(ACC)
        total = tl.dot(rows, low, total, input_precision=PRECISION, out_dtype=ACC)
    out_ptrs = out_ptr + expert.to(tl.int64) * (width * rank)
    out_ptrs += column[:, None] * stride_n + low_column[None, :] * stride_r
    mask = (column < width)[:, None] & (low_column < rank)[None, :]
    tl.store(out_ptrs, (total * scale).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["scale_bits"])
def grouped_lora_wgrad_kernel(
    grad_ptr,
    x_ptr,
    grad_low_ptr,
    low_ptr,
    grad_A_ptr,
    grad_B_ptr,
    offsets_ptr,
    scale_bits,
    num_experts,
    inner: tl.constexpr,
    width: tl.constexpr,
    rank: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes `grad_A[e] = scale * grad_low.T @ x` and `grad_B[e] = scale * grad.T @ low`.

    They are zero for experts without rows.
    """
    scale = bits_to_float(scale_bits, ACC)
    tiles_of_A = tl.cdiv(inner, BLOCK_M)
    tiles_of_expert = tiles_of_A + tl.cdiv(width, BLOCK_M)
    for tile in range(tl.program_id(0), num_experts * tiles_of_expert, tl.num_programs(0)):
        expert = tile // tiles_of_expert
        column_tile = tile % tiles_of_expert
        begin, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
        if column_tile < tiles_of_A:
            low_rank_gradient(
                x_ptr,
                grad_low_ptr,
                grad_A_ptr,
                expert,
                column_tile,
                begin,
                end,
                scale,
                inner,
                rank,
                1,
                inner,
                RANK,
                BLOCK_M,
                BLOCK_K,
                ACC,
                PRECISION,
                UPCAST,
            )
        else:
            low_rank_gradient(
                grad_ptr,
                low_ptr,
                grad_B_ptr,
                expert,
                column_tile - tiles_of_A,
                begin,
                end,
                scale,
                width,
                rank,
                rank,
                1,
                RANK,
                BLOCK_M,
                BLOCK_K,
                ACC,
                PRECISION,
                UPCAST,
            )


def grouped_lora_wgrad(
    grad: Tensor,
    x: Tensor,
    grad_low: Tensor,
    low: Tensor,
    expert_offsets: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of A `[E, r, D]` and of B `[E, F, r]`.

    Args:
        grad: `[N, F]`, contiguous, of the output.
        x: `[N, D]`, contiguous.
        grad_low: `[N, r]`, contiguous: `B.T @ grad` of each row.
        low: `[N, r]`, contiguous: `A @ x` of each row.
        expert_offsets: `[E + 1]`.
        scale: Factor of the update.
    """
    (num_rows, inner), width, rank = x.shape, grad.shape[1], low.shape[1]
    num_experts = expert_offsets.shape[0] - 1
    grad_A = x.new_empty(num_experts, rank, inner)
    grad_B = x.new_empty(num_experts, width, rank)
    device = device_of(x)
    tf32, rows = precision(x.dtype) == "tf32", rows_bucket(num_rows, num_experts)
    problem = Problem("low_rank_weights", inner, width, rank, num_experts, 1, x.dtype, rows, tf32)
    tile = choose(problem, device)
    column_tiles = triton.cdiv(inner, tile.block_m) + triton.cdiv(width, tile.block_m)
    grid = (num_programs(problem, tile, num_experts * column_tiles, device),)
    with torch.cuda.device_of(x):
        grouped_lora_wgrad_kernel[grid](
            grad,
            x,
            grad_low,
            low,
            grad_A,
            grad_B,
            expert_offsets.contiguous(),
            float_bits(scale),
            num_experts,
            inner,
            width,
            rank,
            RANK=rank_columns(rank),
            BLOCK_M=tile.block_m,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **matmul_constants(x.dtype),
        )
    return grad_A, grad_B
