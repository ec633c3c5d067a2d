"""Triton kernel of `permute`: each program copies a few rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from unimoe_kernels._triton.planned import Launch, Place, place_of, planned

MAX_BLOCK_N = 1024
BLOCK_ELEMENTS = 2048  # of a program: 8 elements a thread with 8 warps, not tuned on a GPU


@triton.jit(do_not_specialize=["num_rows"])
def permute_kernel(
    x_ptr,
    out_ptr,
    row_order_ptr,
    offsets_ptr,
    num_rows,
    num_experts,
    width,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Copies `BLOCK_M` rows, `BLOCK_N` columns; rows past the routed ones become zero."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    routed_mask_m = offs_m < tl.load(offsets_ptr + num_experts)
    token_M = tl.load(row_order_ptr + offs_m, mask=routed_mask_m, other=0) // TOP_K
    mask_n = offs_n < width
    source_offs_mn = token_M.to(tl.int64)[:, None] * width + offs_n[None, :]
    x_MN = tl.load(x_ptr + source_offs_mn, mask=routed_mask_m[:, None] & mask_n[None, :], other=0)
    out_offs_mn = offs_m.to(tl.int64)[:, None] * width + offs_n[None, :]
    tl.store(out_ptr + out_offs_mn, x_MN, mask=(offs_m < num_rows)[:, None] & mask_n[None, :])


def permute(x: Tensor, row_order: Tensor, expert_offsets: Tensor, top_k: int) -> Tensor:
    """Copies rows of contiguous `x`; see `ops/permute/op.py`."""
    num_rows, width = row_order.shape[0], x.shape[1]
    out = x.new_empty(num_rows, width)
    if out.numel() == 0:
        return out
    launch = _copy(place_of(x), num_rows, expert_offsets.shape[0] - 1, width, top_k)
    launch(x, out, row_order, expert_offsets.contiguous())
    return out


@planned
def _copy(place: Place, num_rows: int, num_experts: int, width: int, top_k: int) -> Launch:
    block_n = min(triton.next_power_of_2(width), MAX_BLOCK_N)
    block_m = BLOCK_ELEMENTS // block_n
    return Launch(
        place,
        permute_kernel,
        (triton.cdiv(num_rows, block_m), triton.cdiv(width, block_n)),
        (num_rows, num_experts, width),
        {"TOP_K": top_k, "BLOCK_M": block_m, "BLOCK_N": block_n},
    )
