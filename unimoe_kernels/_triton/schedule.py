"""Which tile a program works on, worked out on the device from the offsets of the experts.

The rows of an expert are cut into tiles of `BLOCK_M`; experts without rows have none, so their
weights are not read. Every program knows the number of tiles of each expert and finds the expert
of a tile by counting, so that neither the host nor a kernel before this one has to make a list.

Tiles of output are numbered in groups of `GROUP_M` row tiles, row tiles fastest: programs that run
at the same time share rows as well as columns of weights, which then come from the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_row_tiles(
    offsets_ptr,
    num_rows,
    num_experts,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Returns the running number of row tiles `[EXPERTS]` and that of each expert.

    With `TAIL` the rows that no expert owns count as those of an expert number `num_experts`.
    """
    expert = tl.arange(0, EXPERTS)
    begin = tl.load(offsets_ptr + expert, mask=expert <= num_experts, other=0)
    end = tl.load(offsets_ptr + expert + 1, mask=expert < num_experts, other=0)
    if TAIL:
        end = tl.where(expert == num_experts, num_rows, end)
    tiles = tl.where(end > begin, (end - begin + BLOCK_M - 1) // BLOCK_M, 0)
    return tl.cumsum(tiles, axis=0), tiles


@triton.jit
def locate_tile(tile, num_row_tiles, num_column_tiles, GROUP_M: tl.constexpr):
    """Returns row tile and column tile of a tile of output."""
    tiles_in_group = GROUP_M * num_column_tiles
    first = tile // tiles_in_group * GROUP_M
    height = tl.minimum(num_row_tiles - first, GROUP_M)
    within = tile % tiles_in_group
    return first + within % height, within // height


@triton.jit
def locate_rows(
    row_tile,
    ends,
    tiles,
    offsets_ptr,
    num_rows,
    num_experts,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Returns the expert of a row tile, the first row of the tile and the end of its rows."""
    before = ends <= row_tile
    expert = tl.sum(before.to(tl.int32), axis=0)
    first_tile = tl.sum(tl.where(before, tiles, 0), axis=0)
    begin = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1, mask=expert < num_experts, other=num_rows)
    return expert, begin + (row_tile - first_tile) * BLOCK_M, end
