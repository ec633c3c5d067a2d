"""Loads of the operands of a matmul, with masks only where a size does not divide the tile."""

from __future__ import annotations

import triton
import triton.language as tl


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
