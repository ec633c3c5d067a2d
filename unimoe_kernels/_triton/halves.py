"""Loads and stores of rows that hold gate and up side by side, `width` columns each."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_halves(ptr, offs_m, offs_n, width, mask_mn, ACC: tl.constexpr):
    """Loads gate and up `[M, N]` from rows of `2 * width`; `offs_m` is int64."""
    gate_offs_mn = offs_m[:, None] * (2 * width) + offs_n[None, :]
    gate_MN = tl.load(ptr + gate_offs_mn, mask=mask_mn, other=0).to(ACC)
    return gate_MN, tl.load(ptr + gate_offs_mn + width, mask=mask_mn, other=0).to(ACC)


@triton.jit
def store_halves(ptr, gate_MN, up_MN, offs_m, offs_n, width, mask_mn):
    """Stores gate and up `[M, N]` into rows of `2 * width`; `offs_m` is int64."""
    gate_offs_mn = offs_m[:, None] * (2 * width) + offs_n[None, :]
    tl.store(ptr + gate_offs_mn, gate_MN.to(ptr.dtype.element_ty), mask=mask_mn)
    tl.store(ptr + gate_offs_mn + width, up_MN.to(ptr.dtype.element_ty), mask=mask_mn)


@triton.jit
def split_halves(block_MN, M: tl.constexpr, N: tl.constexpr):
    """Returns the left and the right half of a block `[M, N]`."""
    return block_MN.reshape(M, 2, N // 2).permute(0, 2, 1).split()
