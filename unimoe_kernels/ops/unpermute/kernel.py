"""Triton kernels of `unpermute` and its gradient: one program a token, one program a routed row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK_D = 1024


@triton.jit
def unpermute_kernel(
    rows_ptr,
    out_ptr,
    inverse_order_ptr,
    num_routed_ptr,
    scores_ptr,
    width,
    TOP_K: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
):
    """Sums the rows of one token in choice order, for `BLOCK_D` columns."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < width
    num_routed = tl.load(num_routed_ptr)
    total = tl.zeros((BLOCK_D,), dtype=ACC_DTYPE)
    for k in range(TOP_K):
        position = tl.load(inverse_order_ptr + token * TOP_K + k)
        routed = position < num_routed
        address = position.to(tl.int64) * width + column
        # No column of a row that belongs to another rank is read.
        wanted = column < tl.where(routed, width, 0)
        value = tl.load(rows_ptr + address, mask=wanted, other=0).to(ACC_DTYPE)
        if HAS_SCORES:
            score = tl.load(scores_ptr + token * TOP_K + k, mask=routed, other=0)
            value *= score.to(ACC_DTYPE)
        total += value
    tl.store(out_ptr + token * width + column, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def unpermute_backward_kernel(
    grad_ptr,
    rows_ptr,
    grad_rows_ptr,
    grad_scores_ptr,
    inverse_order_ptr,
    num_routed_ptr,
    scores_ptr,
    width,
    TOP_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
):
    """Writes the gradients of one routed row and of its score."""
    row = tl.program_id(0)
    token = (row // TOP_K).to(tl.int64)
    position = tl.load(inverse_order_ptr + row)
    routed = position < tl.load(num_routed_ptr)
    score = tl.load(scores_ptr + row, mask=routed, other=0).to(ACC_DTYPE)
    start = position.to(tl.int64) * width
    num_columns = tl.where(routed, width, 0)
    dot = tl.zeros((BLOCK_D,), dtype=ACC_DTYPE)
    for first in range(0, width, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        wanted = column < num_columns
        grad = tl.load(grad_ptr + token * width + column, mask=wanted, other=0).to(ACC_DTYPE)
        value = tl.load(rows_ptr + start + column, mask=wanted, other=0).to(ACC_DTYPE)
        dot += grad * value
        grad_row = (score * grad).to(grad_rows_ptr.dtype.element_ty)
        tl.store(grad_rows_ptr + start + column, grad_row, mask=column < width)
    grad_score = tl.sum(dot, axis=0).to(grad_scores_ptr.dtype.element_ty)
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
    block_d = min(triton.next_power_of_2(width), MAX_BLOCK_D)
    with torch.cuda.device_of(rows):
        unpermute_kernel[(num_tokens, triton.cdiv(width, block_d))](
            rows,
            out,
            inverse_order,
            expert_offsets[-1:],
            rows if scores is None else scores,
            width,
            TOP_K=top_k,
            HAS_SCORES=scores is not None,
            BLOCK_D=block_d,
            ACC_DTYPE=_accumulator(rows),
        )
    return out


def unpermute_backward(
    grad: Tensor,
    rows: Tensor,
    inverse_order: Tensor,
    expert_offsets: Tensor,
    scores: Tensor,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of contiguous rows and scores."""
    num_rows, width = rows.shape
    grad_rows, grad_scores = rows.new_empty(num_rows, width), torch.empty_like(scores)
    if num_rows == 0:
        return grad_rows, grad_scores
    with torch.cuda.device_of(rows):
        unpermute_backward_kernel[(num_rows,)](
            grad,
            rows,
            grad_rows,
            grad_scores,
            inverse_order,
            expert_offsets[-1:],
            scores,
            width,
            TOP_K=top_k,
            BLOCK_D=min(triton.next_power_of_2(max(width, 1)), MAX_BLOCK_D),
            ACC_DTYPE=_accumulator(rows),
        )
    return grad_rows, grad_scores


def _accumulator(rows: Tensor) -> tl.dtype:
    return tl.float64 if rows.dtype == torch.float64 else tl.float32
