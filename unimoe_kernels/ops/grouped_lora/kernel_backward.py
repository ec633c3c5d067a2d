"""Triton kernel of the weight gradients of `grouped_lora`: those of A and B in one launch.

Both are sums, over the rows of an expert, of products of a row of width D or F and one of width r.
A program holds a block of those columns by all r in registers, so that the wide rows are read once.
Blocks are narrow enough that a single expert with all rows has tiles for most of a GPU; no sum is
split.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unimoe_kernels._triton.launch import (
    bits_to_float,
    float_bits,
    matmul_constants,
    precision,
)
from unimoe_kernels._triton.matmul import add_product
from unimoe_kernels._triton.planned import Launch, Place, place_of, planned
from unimoe_kernels._triton.tiles import Problem, choose, num_programs, rank_columns, rows_bucket


@triton.jit
def low_rank_gradient(
    rows_ptr,
    low_ptr,
    out_ptr,
    expert,
    tile_m,
    begin_k,
    end_k,
    scale,
    width: tl.constexpr,
    rank: tl.constexpr,
    stride_out_m: tl.constexpr,
    stride_out_r: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes some columns of `scale * rows.T @ low`, summed over rows from `begin_k` to `end_k`."""
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r, offs_in_k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    acc_MR = tl.zeros((BLOCK_M, BLOCK_R), dtype=ACC)
    for start_k in range(begin_k, end_k, BLOCK_K):
        offs_k = start_k + offs_in_k
        mask_k = offs_k < end_k
        offs_k = offs_k.to(tl.int64)
        # Rows past the end belong to other experts or do not exist.
        rows_mask_mk, low_mask_kr = mask_k[None, :], mask_k[:, None]
        if width % BLOCK_M != 0:
            rows_mask_mk = rows_mask_mk & (offs_m < width)[:, None]
        if rank != BLOCK_R:
            low_mask_kr = low_mask_kr & (offs_r < rank)[None, :]
        rows_ptrs = rows_ptr + offs_k[None, :] * width + offs_m[:, None]
        rows_MK = tl.load(rows_ptrs, mask=rows_mask_mk, other=0)
        low_ptrs = low_ptr + offs_k[:, None] * rank + offs_r[None, :]
        low_KR = tl.load(low_ptrs, mask=low_mask_kr, other=0)
        acc_MR = add_product(rows_MK, low_KR, acc_MR, PRECISION, UPCAST)
    out_ptrs = out_ptr + expert.to(tl.int64) * (width * rank)
    out_ptrs += offs_m[:, None] * stride_out_m + offs_r[None, :] * stride_out_r
    mask_mr = (offs_m < width)[:, None] & (offs_r < rank)[None, :]
    tl.store(out_ptrs, (acc_MR * scale).to(out_ptr.dtype.element_ty), mask=mask_mr)


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
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes `grad_A[e] = scale * grad_low.T @ x` and `grad_B[e] = scale * grad.T @ low`.

    Both are zero for experts without rows.
    """
    scale = bits_to_float(scale_bits, ACC)
    tiles_of_A = tl.cdiv(inner, BLOCK_M)
    tiles_of_expert = tiles_of_A + tl.cdiv(width, BLOCK_M)
    for tile in range(tl.program_id(0), num_experts * tiles_of_expert, tl.num_programs(0)):
        expert = tile // tiles_of_expert
        tile_m = tile % tiles_of_expert
        begin_k, end_k = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
        if tile_m < tiles_of_A:
            low_rank_gradient(
                x_ptr,
                grad_low_ptr,
                grad_A_ptr,
                expert,
                tile_m,
                begin_k,
                end_k,
                scale,
                inner,
                rank,
                1,
                inner,
                BLOCK_R,
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
                tile_m - tiles_of_A,
                begin_k,
                end_k,
                scale,
                width,
                rank,
                rank,
                1,
                BLOCK_R,
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
        grad: `[N, F]`, contiguous, the gradient of the output.
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
    launch = _launch(
        place_of(x), (num_rows, num_experts, inner, width, rank), scale, x.dtype, precision(x.dtype)
    )
    launch(grad, x, grad_low, low, grad_A, grad_B, expert_offsets.contiguous())
    return grad_A, grad_B


@planned
def _launch(
    place: Place, sizes: tuple[int, ...], scale: float, dtype: torch.dtype, precision: str
) -> Launch:
    num_rows, num_experts, inner, width, rank = sizes
    rows, tf32 = rows_bucket(num_rows, num_experts), precision == "tf32"
    problem = Problem("low_rank_weights", inner, width, rank, num_experts, 1, dtype, rows, tf32)
    tile = choose(problem, place.gpu)
    column_tiles = triton.cdiv(inner, tile.block_m) + triton.cdiv(width, tile.block_m)
    return Launch(
        place,
        grouped_lora_wgrad_kernel,
        (num_programs(problem, tile, num_experts * column_tiles, place.gpu),),
        (float_bits(scale), num_experts, inner, width, rank),
        {
            "BLOCK_R": rank_columns(rank),
            "BLOCK_M": tile.block_m,
            "BLOCK_K": tile.block_k,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            **matmul_constants(dtype),
        },
    )
