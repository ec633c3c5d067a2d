"""Assignment of tiles to programs, computed on the device from the expert offsets.

The rows of an expert are split into tiles of `BLOCK_M`; experts without rows have no tiles, so
their weights are not read. Every program computes the number of tiles of each expert and finds the
expert of a tile by counting, so that neither the host nor a preceding kernel has to build a list.

Output tiles are numbered in groups of `GROUP_M` row tiles, row tiles fastest: concurrent programs
share rows and columns of weights, which then come from the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_row_tiles(
    offsets_ptr,
    num_rows,
    num_experts,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Returns the cumulative number of row tiles and the number per expert, both `[BLOCK_E]`.

    With `TAIL` the rows that no expert owns count as rows of an expert with index `num_experts`.
    """
    offs_e = tl.arange(0, BLOCK_E)
    begin_E = tl.load(offsets_ptr + offs_e, mask=offs_e <= num_experts, other=0)
    end_E = tl.load(offsets_ptr + offs_e + 1, mask=offs_e < num_experts, other=0)
    if TAIL:
        end_E = tl.where(offs_e == num_experts, num_rows, end_E)
    tiles_E = tl.where(end_E > begin_E, (end_E - begin_E + BLOCK_M - 1) // BLOCK_M, 0)
    return tl.cumsum(tiles_E, axis=0), tiles_E


@triton.jit
def locate_tile(tile, num_tiles_m, num_tiles_n, GROUP_M: tl.constexpr):
    """Returns the row tile and the column tile of an output tile."""
    tiles_in_group = GROUP_M * num_tiles_n
    start_m = tile // tiles_in_group * GROUP_M
    tiles_high = tl.minimum(num_tiles_m - start_m, GROUP_M)
    within = tile % tiles_in_group
    return start_m + within % tiles_high, within // tiles_high


@triton.jit
def locate_rows(
    tile_m,
    ends_E,
    tiles_E,
    offsets_ptr,
    num_rows,
    num_experts,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Returns the expert of a row tile, the first row of the tile and the end of its rows."""
    before_E = ends_E <= tile_m
    expert = tl.sum(before_E.to(tl.int32), axis=0)
    first_tile_m = tl.sum(tl.where(before_E, tiles_E, 0), axis=0)
    start_m = tl.load(offsets_ptr + expert)
    end_m = tl.load(offsets_ptr + expert + 1, mask=expert < num_experts, other=num_rows)
    return expert, start_m + (tile_m - first_tile_m) * BLOCK_M, end_m
