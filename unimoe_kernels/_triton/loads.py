"""Loads of the operands of a matmul: through pointers, or through tensor descriptors.

A descriptor (TMA, sm_90 and later) copies a block with one instruction of one thread and fills with
zeros outside the tensor. Pointers take a register per address, can gather rows, and need masks
where the tile does not divide the size. The form of each operand is a compile-time constant chosen
in `descriptors.py`, so the other form is not compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.tools.ragged_tma import load_ragged


@triton.jit
def source_rows(offs_m, row_order_ptr, TOP_K: tl.constexpr):
    """Returns the source index of each row: its token (`TOP_K > 0`), or the row itself."""
    if TOP_K > 0:
        offs_m = tl.load(row_order_ptr + offs_m) // TOP_K
    return offs_m.to(tl.int64)


@triton.jit
def load_block(ptrs, mask_m, mask_n, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr):
    """Loads a block, with zeros outside the rows `mask_m` and columns `mask_n`.

    With `EVEN_M` (`EVEN_N`) all rows (columns) are in bounds; the mask is ignored and may be None.
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

    Rows past the end repeat the last row or belong to the next expert: they are loaded without a
    mask, and their results are never stored.
    """
    if FORM == "pointers":
        offs_m = tl.minimum(start_m + tl.arange(0, BLOCK_M), end_m - 1)
        offs_m = source_rows(offs_m, row_order_ptr, TOP_K)
        return source + offs_m[:, None] * stride_m + offs_k[None, :]
    else:
        return start_m


@triton.jit
def read_rows(source, place, start_k, mask_k, EVEN_K: tl.constexpr, FORM: tl.constexpr):
    """Reads `[M, K]`, starting at `start_k` along the summed axis."""
    if FORM == "pointers":
        return load_block(place, None, mask_k, True, EVEN_K)
    else:
        return source.load([place, start_k])


@triton.jit
def place_weight(source, expert, offs_n, offs_k, stride_e, stride_n, stride_k, FORM: tl.constexpr):
    """Returns pointers `[K, N]` to the start of columns, or for a descriptor the expert index."""
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
    """Reads `[K, N]`, starting at `start_k` along the summed axis."""
    if FORM == "by_column":  # [E, N, K]
        weight_NK = source.load([place, start_n, start_k])
        return weight_NK.reshape(mask_n.shape[0], mask_k.shape[0]).T
    elif FORM == "by_row":  # [E, K, N]
        return source.load([place, start_k, start_n]).reshape(mask_k.shape[0], mask_n.shape[0])
    else:
        return load_block(place, mask_k, mask_n, EVEN_K, EVEN_N)


@triton.jit
def advance(place, by, FORM: tl.constexpr):
    """Advances pointers; a descriptor is indexed by its coordinates at each step instead."""
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
    """Reads rows `[K, N]` from `start_k` on of an expert that owns rows `begin_k` to `end_k`.

    Rows of other experts read as zeros.
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
