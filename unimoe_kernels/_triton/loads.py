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
def source_rows(rows, row_order_ptr, TOP_K: tl.constexpr):
    """Returns where rows are read: at the token of each (`TOP_K > 0`), or in place."""
    if TOP_K > 0:
        rows = tl.load(row_order_ptr + rows) // TOP_K
    return rows.to(tl.int64)


@triton.jit
def load_rows(ptrs, known, EVEN_K: tl.constexpr):
    """Loads `[M, K]` of which the columns `known` exist; rows must all exist."""
    if EVEN_K:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=known[None, :], other=0)


@triton.jit
def load_weight(ptrs, known, inside, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr):
    """Loads `[K, N]` of which the rows `known` and the columns `inside` exist."""
    if EVEN_K and EVEN_N:
        return tl.load(ptrs)
    elif EVEN_K:
        return tl.load(ptrs, mask=inside[None, :], other=0)
    elif EVEN_N:
        return tl.load(ptrs, mask=known[:, None], other=0)
    else:
        return tl.load(ptrs, mask=known[:, None] & inside[None, :], other=0)


@triton.jit
def place_rows(
    source,
    first_row,
    end_row,
    step,
    stride,
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
        row = tl.minimum(first_row + tl.arange(0, BLOCK_M), end_row - 1)
        row = source_rows(row, row_order_ptr, TOP_K)
        return source + row[:, None] * stride + step[None, :]
    else:
        return first_row


@triton.jit
def read_rows(source, place, k, known, EVEN_K: tl.constexpr, FORM: tl.constexpr):
    """Reads `[M, K]` at step k of the sum, through whatever `FORM` is."""
    if FORM == "pointers":
        return load_rows(place, known, EVEN_K)
    else:
        return source.load([place, k])


@triton.jit
def place_weight(source, expert, column, step, stride_e, stride_n, stride_k, FORM: tl.constexpr):
    """Returns pointers `[K, N]` to the start of columns, or for a descriptor the expert."""
    if FORM == "pointers":
        ptrs = source + expert.to(tl.int64) * stride_e
        ptrs += column.to(tl.int64)[None, :] * stride_n
        return ptrs + step.to(tl.int64)[:, None] * stride_k
    else:
        return expert


@triton.jit
def read_weight(
    source,
    place,
    first_column,
    k,
    known,
    inside,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    FORM: tl.constexpr,
):
    """Reads `[K, N]` at step k of the sum, through whatever `FORM` is."""
    if FORM == "by_column":  # [E, N, K]
        block = source.load([place, first_column, k])
        return block.reshape(inside.shape[0], known.shape[0]).T
    elif FORM == "by_row":  # [E, K, N]
        return source.load([place, k, first_column]).reshape(known.shape[0], inside.shape[0])
    else:
        return load_weight(place, known, inside, EVEN_K, EVEN_N)


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
    begin,
    end,
    first,
    first_column,
    row_order_ptr,
    width,
    TOP_K: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FORM: tl.constexpr,
):
    """Reads `[K, N]`: rows from `first` on of an expert that owns `begin` to `end`, else zeros."""
    if FORM != "pointers":
        return load_ragged(source, begin, end - begin, [first - begin, first_column])
    else:
        row = first + tl.arange(0, BLOCK_K)
        column = first_column + tl.arange(0, BLOCK_N)
        mask = (row < end)[:, None]
        if not EVEN:
            mask = mask & (column < width)[None, :]
        row = source_rows(tl.minimum(row, end - 1), row_order_ptr, TOP_K)
        return tl.load(source + row[:, None] * width + column[None, :], mask=mask, other=0)
