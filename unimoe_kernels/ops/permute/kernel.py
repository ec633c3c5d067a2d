"""Triton kernel of `permute`: each program copies a few rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK_D = 1024
BLOCK_ELEMENTS = 2048  # of a program: 8 elements a thread with 8 warps, not tuned on a GPU


@triton.jit(do_not_specialize=["num_rows"])
def permute_kernel(
    x_ptr,
    out_ptr,
    row_order_ptr,
    num_routed_ptr,
    num_rows,
    width,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copies `BLOCK_N` rows, `BLOCK_D` columns; rows past the routed ones become zero."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    routed = row < tl.load(num_routed_ptr)
    token = tl.load(row_order_ptr + row, mask=routed, other=0) // TOP_K
    inside = (column < width)[None, :]
    source = token.to(tl.int64)[:, None] * width + column[None, :]
    value = tl.load(x_ptr + source, mask=routed[:, None] & inside, other=0)
    target = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out_ptr + target, value, mask=(row < num_rows)[:, None] & inside)


def permute(x: Tensor, row_order: Tensor, expert_offsets: Tensor, top_k: int) -> Tensor:
    """Copies rows of contiguous `x`; see `ops/permute/op.py`."""
    num_rows, width = row_order.shape[0], x.shape[1]
    out = x.new_empty(num_rows, width)
    if out.numel() == 0:
        return out
    block_d = min(triton.next_power_of_2(width), MAX_BLOCK_D)
    block_n = BLOCK_ELEMENTS // block_d
    grid = (triton.cdiv(num_rows, block_n), triton.cdiv(width, block_d))
    with torch.cuda.device_of(x):
        permute_kernel[grid](
            x,
            out,
            row_order,
            expert_offsets[-1:],
            num_rows,
            width,
            TOP_K=top_k,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
        )
    return out
