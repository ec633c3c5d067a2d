"""Triton kernel of `permute`: each program reads a few tokens once and writes their K rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from unimoe_kernels._triton.planned import Launch, Place, place_of, planned

MAX_BLOCK_N = 1024
BLOCK_ELEMENTS = 2048  # per program: 8 elements per thread with 8 warps; not tuned on a GPU


@triton.jit(do_not_specialize=["num_tokens"])
def permute_kernel(
    x_ptr,
    out_ptr,
    inverse_order_ptr,
    offsets_ptr,
    num_tokens,
    num_experts,
    width,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Copies `BLOCK_N` columns of `BLOCK_M` tokens; rows from `expert_offsets[E]` on are zero."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < num_tokens
    mask_mn = mask_m[:, None] & (offs_n < width)[None, :]
    num_routed = tl.load(offsets_ptr + num_experts)
    x_offs_mn = offs_m.to(tl.int64)[:, None] * width + offs_n[None, :]
    x_MN = tl.load(x_ptr + x_offs_mn, mask=mask_mn, other=0)
    for k in range(TOP_K):
        choice_offs_m = offs_m.to(tl.int64) * TOP_K + k
        position_M = tl.load(inverse_order_ptr + choice_offs_m, mask=mask_m, other=0)
        row_MN = tl.where((position_M < num_routed)[:, None], x_MN, tl.zeros_like(x_MN))
        out_offs_mn = position_M.to(tl.int64)[:, None] * width + offs_n[None, :]
        # Streaming stores, so that the rows do not evict x from the cache.
        tl.store(out_ptr + out_offs_mn, row_MN, mask=mask_mn, cache_modifier=".cs")


def permute(x: Tensor, inverse_order: Tensor, expert_offsets: Tensor, top_k: int) -> Tensor:
    """Copies rows of contiguous `x`; see `ops/permute/op.py`."""
    num_tokens, width = x.shape
    out = x.new_empty(inverse_order.shape[0], width)
    if out.numel() == 0:
        return out
    launch = _copy(place_of(x), num_tokens, expert_offsets.shape[0] - 1, width, top_k)
    launch(x, out, inverse_order, expert_offsets.contiguous())
    return out


@planned
def _copy(place: Place, num_tokens: int, num_experts: int, width: int, top_k: int) -> Launch:
    block_n = min(triton.next_power_of_2(width), MAX_BLOCK_N)
    block_m = BLOCK_ELEMENTS // block_n
    return Launch(
        place,
        permute_kernel,
        (triton.cdiv(num_tokens, block_m), triton.cdiv(width, block_n)),
        (num_tokens, num_experts, width),
        {"TOP_K": top_k, "BLOCK_M": block_m, "BLOCK_N": block_n},
    )
