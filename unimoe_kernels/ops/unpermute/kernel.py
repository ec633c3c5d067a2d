"""Triton kernels of `unpermute` (a program per token) and its gradient (one per routed row)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unimoe_kernels._triton.launch import accumulator
from unimoe_kernels._triton.planned import Launch, Place, place_of, planned

MAX_BLOCK_N = 1024


@triton.jit
def unpermute_kernel(
    rows_ptr,
    out_ptr,
    inverse_order_ptr,
    offsets_ptr,
    scores_ptr,
    num_experts,
    width,
    TOP_K: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sums the rows of one token in choice order, for `BLOCK_N` columns."""
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < width
    num_routed = tl.load(offsets_ptr + num_experts)
    acc_N = tl.zeros((BLOCK_N,), dtype=ACC)
    for k in range(TOP_K):
        position = tl.load(inverse_order_ptr + token * TOP_K + k)
        routed = position < num_routed
        rows_offs_n = position.to(tl.int64) * width + offs_n
        # Rows that belong to another rank are not read.
        rows_mask_n = offs_n < tl.where(routed, width, 0)
        rows_N = tl.load(rows_ptr + rows_offs_n, mask=rows_mask_n, other=0).to(ACC)
        if HAS_SCORES:
            score = tl.load(scores_ptr + token * TOP_K + k, mask=routed, other=0)
            rows_N *= score.to(ACC)
        acc_N += rows_N
    tl.store(out_ptr + token * width + offs_n, acc_N.to(out_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def unpermute_backward_kernel(
    grad_ptr,
    rows_ptr,
    grad_rows_ptr,
    grad_scores_ptr,
    inverse_order_ptr,
    offsets_ptr,
    scores_ptr,
    num_experts,
    width,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    """Writes the gradients of one routed row and of its score."""
    row = tl.program_id(0)
    token = (row // TOP_K).to(tl.int64)
    position = tl.load(inverse_order_ptr + row)
    routed = position < tl.load(offsets_ptr + num_experts)
    score = tl.load(scores_ptr + row, mask=routed, other=0).to(ACC)
    rows_start = position.to(tl.int64) * width
    num_columns = tl.where(routed, width, 0)
    acc_N = tl.zeros((BLOCK_N,), dtype=ACC)
    for start_n in range(0, width, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        rows_mask_n = offs_n < num_columns
        grad_N = tl.load(grad_ptr + token * width + offs_n, mask=rows_mask_n, other=0).to(ACC)
        rows_N = tl.load(rows_ptr + rows_start + offs_n, mask=rows_mask_n, other=0).to(ACC)
        acc_N += grad_N * rows_N
        grad_rows_N = (score * grad_N).to(grad_rows_ptr.dtype.element_ty)
        tl.store(grad_rows_ptr + rows_start + offs_n, grad_rows_N, mask=offs_n < width)
    grad_score = tl.sum(acc_N, axis=0).to(grad_scores_ptr.dtype.element_ty)
    tl.store(grad_scores_ptr + row, grad_score)


def unpermute(
    rows: Tensor,
    inverse_order: Tensor,
    expert_offsets: Tensor,
    scores: Tensor | None,
    top_k: int,
) -> Tensor:
    """Sums contiguous rows; see `ops/unpermute/op.py`."""
    num_tokens, width = inverse_order.shape[0] // top_k, rows.shape[1]
    out = rows.new_empty(num_tokens, width)
    if out.numel() == 0:
        return out
    sizes = (num_tokens, expert_offsets.shape[0] - 1, width)
    launch = _sum(place_of(rows), sizes, top_k, scores is not None, rows.dtype)
    offsets = expert_offsets.contiguous()
    launch(rows, out, inverse_order, offsets, rows if scores is None else scores)
    return out


@planned
def _sum(
    place: Place, sizes: tuple[int, int, int], top_k: int, has_scores: bool, dtype: torch.dtype
) -> Launch:
    num_tokens, num_experts, width = sizes
    block_n = min(triton.next_power_of_2(width), MAX_BLOCK_N)
    return Launch(
        place,
        unpermute_kernel,
        (num_tokens, triton.cdiv(width, block_n)),
        (num_experts, width),
        {
            "TOP_K": top_k,
            "HAS_SCORES": has_scores,
            "BLOCK_N": block_n,
            "ACC": accumulator(dtype),
        },
    )


def unpermute_backward(
    grad: Tensor,
    rows: Tensor,
    inverse_order: Tensor,
    expert_offsets: Tensor,
    scores: Tensor,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients with respect to contiguous rows and scores."""
    num_rows, width = rows.shape
    grad_rows, grad_scores = rows.new_empty(num_rows, width), torch.empty_like(scores)
    if num_rows == 0:
        return grad_rows, grad_scores
    sizes = (num_rows, expert_offsets.shape[0] - 1, width)
    launch = _gradients(place_of(rows), sizes, top_k, rows.dtype)
    offsets = expert_offsets.contiguous()
    launch(grad, rows, grad_rows, grad_scores, inverse_order, offsets, scores)
    return grad_rows, grad_scores


@planned
def _gradients(place: Place, sizes: tuple[int, int, int], top_k: int, dtype: torch.dtype) -> Launch:
    num_rows, num_experts, width = sizes
    return Launch(
        place,
        unpermute_backward_kernel,
        (num_rows,),
        (num_experts, width),
        {
            "TOP_K": top_k,
            "BLOCK_N": min(triton.next_power_of_2(max(width, 1)), MAX_BLOCK_N),
            "ACC": accumulator(dtype),
        },
    )
