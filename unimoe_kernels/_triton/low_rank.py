"""Products of rows with narrow (low-rank) weights, and the number of parts of their sums."""

from __future__ import annotations

import triton
import triton.language as tl

from unimoe_kernels._triton.launch import Device
from unimoe_kernels._triton.loads import load_block, place_weight
from unimoe_kernels._triton.matmul import add_product
from unimoe_kernels._triton.problem import Problem, Tile
from unimoe_kernels._triton.tiles import rank_columns

LONG_SUM = 2**17  # elements of one expert's narrow weight
PARTIAL_ELEMENTS = 8192  # partial sums per program: 64 registers a thread
MAX_CHUNKS = 8


@triton.jit
def narrow_product(
    x_ptr,
    narrow_ptr,
    expert,
    offs_m,
    mask_m,
    begin_k,
    end_k,
    inner: tl.constexpr,
    rank: tl.constexpr,
    stride_narrow_e,
    stride_narrow_r: tl.constexpr,
    stride_narrow_k: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Returns `[M, R]`: rows of x times narrow, summed over columns from `begin_k` to `end_k`."""
    offs_k = begin_k + tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * inner + offs_k[None, :]
    narrow_ptrs = place_weight(
        narrow_ptr,
        expert,
        offs_r,
        offs_k,
        stride_narrow_e,
        stride_narrow_r,
        stride_narrow_k,
        "pointers",
    )
    acc_MR = tl.zeros((offs_m.shape[0], BLOCK_R), dtype=ACC)
    for start_k in range(begin_k, end_k, BLOCK_K):
        mask_k = offs_k < inner - (start_k - begin_k)
        x_MK = load_block(x_ptrs, mask_m, mask_k, False, EVEN_K)
        narrow_KR = load_block(narrow_ptrs, mask_k, offs_r < rank, EVEN_K, rank == BLOCK_R)
        acc_MR = add_product(x_MK, narrow_KR, acc_MR, PRECISION, UPCAST)
        x_ptrs += BLOCK_K
        narrow_ptrs += BLOCK_K * stride_narrow_k
    return acc_MR


def num_chunks(problem: Problem, tile: Tile, num_rows: int, device: Device) -> int:
    """Returns the number of parts of a split narrow sum, a power of 2; 0 for no split.

    Partial sums are computed in a launch of their own.
    """
    row_tiles = min(num_rows, num_rows // tile.block_m + problem.experts)
    rank = rank_columns(problem.height)
    chunks = min(MAX_CHUNKS, PARTIAL_ELEMENTS // (tile.block_m * rank))
    worth_it = 2 * row_tiles <= device.processors and rank * problem.inner >= LONG_SUM
    return chunks if worth_it and chunks > 1 else 0
