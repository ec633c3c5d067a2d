"""Loads of the operands of a matmul: through pointers, or through tensor descriptors.

A descriptor (TMA, sm_90 and later) copies a block by one instruction of one thread, and gives zeros
outside of the tensor; pointers take a register an address, go wherever rows are gathered from, and
need masks where a size does not divide the tile. Which one an operand comes through is a constant
of the kernel, so that the other is not compiled; `descriptors.py` decides.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.tools.ragged_tma import load_ragged


@triton.jit
def source_rows(offs_m, row_order_ptr, TOP_K: tl.constexpr):
    """Returns where rows are read: at the token of each (`TOP_K > 0`), or in place."""
    if TOP_K > 0:
        offs_m = tl.load(row_order_ptr + offs_m) // TOP_K
    return offs_m.to(tl.int64)


@triton.jit
def load_block(ptrs, mask_m, mask_n, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr):
    """Loads the rows `mask_m` and columns `mask_n` of a block that exist, zeros elsewhere.

    Where all of them exist (`EVEN_M`, `EVEN_N`) a mask is not looked at and may be None.
    """
    if EVEN_M and EVEN_N:
        return tl.load(ptrs)
    elif EVEN_M:
        return tl.load(ptrs, mask=mask_n[None, :], other=0)
    elif EVEN_N:
        return tl.load(ptrs, mask=mask_m[:, None], other=0)
    else:
        return tl.load(ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0)


@triton.jit
def place_rows(
    source,
    start_m,
    end_m,
    offs_k,
    stride_m,
    row_order_ptr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    FORM: tl.constexpr,
):
    """Returns pointers `[M, K]` to the start of rows, or for a descriptor the first row.

    Rows past the end are the last one again, or those of the next expert: loads without a mask,
    and nothing of them is stored.
    """
    if FORM == "pointers":
        offs_m = tl.minimum(start_m + tl.arange(0, BLOCK_M), end_m - 1)
        offs_m = source_rows(offs_m, row_order_ptr, TOP_K)
        return source + offs_m[:, None] * stride_m + offs_k[None, :]
    else:
        return start_m


@triton.jit
def read_rows(source, place, start_k, mask_k, EVEN_K: tl.constexpr, FORM: tl.constexpr):
    """Reads `[M, K]` from `start_k` on along the sum, through whatever `FORM` is."""
    if FORM == "pointers":
        return load_block(place, None, mask_k, True, EVEN_K)
    else:
        return source.load([place, start_k])


@triton.jit
def place_weight(source, expert, offs_n, offs_k, stride_e, stride_n, stride_k, FORM: tl.constexpr):
    """Returns pointers `[K, N]` to the start of columns, or for a descriptor the expert."""
    if FORM == "pointers":
        ptrs = source + expert.to(tl.int64) * stride_e
        ptrs += offs_n.to(tl.int64)[None, :] * stride_n
        return ptrs + offs_k.to(tl.int64)[:, None] * stride_k
    else:
        return expert


@triton.jit
def read_weight(
    source,
    place,
    start_n,
    start_k,
    mask_k,
    mask_n,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    FORM: tl.constexpr,
):
    """Reads `[K, N]` from `start_k` on along the sum, through whatever `FORM` is."""
    if FORM == "by_column":  # [E, N, K]
        weight_NK = source.load([place, start_n, start_k])
        return weight_NK.reshape(mask_n.shape[0], mask_k.shape[0]).T
    elif FORM == "by_row":  # [E, K, N]
        return source.load([place, start_k, start_n]).reshape(mask_k.shape[0], mask_n.shape[0])
    else:
        return load_block(place, mask_k, mask_n, EVEN_K, EVEN_N)


@triton.jit
def advance(place, by, FORM: tl.constexpr):
    """Moves pointers along; a block that a descriptor reads is named anew at each step."""
    if FORM == "pointers":
        return place + by
    else:
        return place


@triton.jit
def read_owned(
    source,
    begin_k,
    end_k,
    start_k,
    start_n,
    width,
    EVEN_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FORM: tl.constexpr,
):
    """Reads `[K, N]`: rows from `start_k` on of an expert that owns `begin_k` to `end_k`.

    Rows of another expert are zeros.
    """
    if FORM != "pointers":
        return load_ragged(source, begin_k, end_k - begin_k, [start_k - begin_k, start_n])
    else:
        offs_k = start_k + tl.arange(0, BLOCK_K)
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_kn = (offs_k < end_k)[:, None]
        if not EVEN_N:
            mask_kn = mask_kn & (offs_n < width)[None, :]
        offs_k = tl.minimum(offs_k, end_k - 1).to(tl.int64)
        return tl.load(source + offs_k[:, None] * width + offs_n[None, :], mask=mask_kn, other=0)
