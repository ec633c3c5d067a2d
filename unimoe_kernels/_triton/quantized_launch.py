"""Launch parameters of products with quantised weights: constants, tiles, parts and grids."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from unimoe_kernels._triton.launch import Device, accumulator
from unimoe_kernels._triton.problem import Problem, Tile
from unimoe_kernels._triton.tiles import (
    GROUP_M,
    INTERPRETED,
    MAX_STAGES,
    RESERVED_BYTES,
    permitted,
    product_constants,
)

# Average rows per expert up to which reading the weights takes longer than multiplying.
FEW_ROWS = 32
# Least length of a part of a split sum.
SHORTEST_PART = 512
MAX_PARTS = 8
# Rows and columns of a block in which partial sums are added.
ADD_BLOCK_ROWS = 4
ADD_BLOCK_COLUMNS = 128
# Concurrent programs per multiprocessor, for few rows.
AT_ONCE = 4


class Stored(NamedTuple):
    """The properties of a quantised weight that determine its launch.

    Attributes:
        experts: E.
        rows: rows of one expert in the stored layout.
        width: numbers per row.
        group: numbers that share a scale.
        four_bits: whether a byte holds two integers; if not, values are int8.
        has_zeros: whether groups have zero points.
        transposed: whether the product sums over the rows of the weight instead of its columns.
    """

    experts: int
    rows: int
    width: int
    group: int
    four_bits: bool
    has_zeros: bool
    transposed: bool = False


def stored(
    values: Tensor, scales: Tensor, zeros: Tensor | None, transposed: bool = False
) -> Stored:
    """Returns the `Stored` properties of a weight `[E, out, in]`."""
    experts, rows, width = values.shape
    four_bits = values.dtype == torch.uint8
    width *= 1 + four_bits
    return Stored(
        experts, rows, width, width // scales.shape[2], four_bits, zeros is not None, transposed
    )


def choose(problem: Problem, weight: Stored, device: Device) -> Tile:
    """Returns the tile of a product. It is derived by arithmetic alone, without measurements.

    Few rows: the tile is as low as the tensor cores allow. A step lies in one group where groups
    have 64 numbers or more, so that the sums are scaled instead of the weights. Many rows: the
    weights of a step pass through registers on their way to shared memory, so tiles are half as
    wide as those of float weights.
    """
    if device.capability == 0:
        return Tile(*INTERPRETED)
    few, width = problem.rows <= FEW_ROWS, problem.width
    if problem.dtype.itemsize > 2:
        side = 64 if problem.dtype == torch.float32 else 32
        shape = (16 if few else side, side, 16, 4)
    elif problem.inner % 16 or width % 16:
        # Without alignment, elements are loaded one by one, and addresses occupy the registers.
        shape = (16 if few else 64, 32 if problem.kind == "rows" else 64, 32, 4)
    elif few:
        shape = (16 if problem.rows <= 16 else 32, 64, 128, 4)
    elif problem.rows <= 64:
        shape = (64, 128, 64, 4)
    else:
        shape = (128, 128, 64, 8)
    block_m, block_n, block_k, num_warps = shape
    if few and not weight.transposed and 64 <= weight.group < width:
        block_k = min(block_k, weight.group)
    if problem.kind == "gated":
        block_n //= 2  # of each half
    block_n = min(block_n, max(16, triton.next_power_of_2(width)))
    block_k = min(block_k, max(16, triton.next_power_of_2(problem.inner)))
    tile = Tile(block_m, block_n, block_k, GROUP_M, num_warps, MAX_STAGES)
    held = device.shared_bytes - RESERVED_BYTES - _block_bytes(problem, tile)
    stages = max(1, min(MAX_STAGES, held // _stage_bytes(problem, weight, tile)))
    aligned = problem.inner % 16 == 0 and width % 16 == 0
    descriptors = block_m >= 64 and aligned and problem.dtype.itemsize == 2
    descriptors = descriptors and 90 <= device.capability < 120
    return permitted(tile._replace(num_stages=stages, descriptors=descriptors))


def num_parts(problem: Problem, tile: Tile, num_rows: int, device: Device) -> int:
    """Returns the number of parts into which the sums are split, a power of 2.

    It is 1 where there are enough tiles. A few rows and narrow experts give fewer tiles than a GPU
    runs concurrently.
    """
    if problem.rows > FEW_ROWS or device.capability == 0:
        return 1
    columns = (2 if problem.kind == "gated" else 1) * problem.width
    tiles = min(num_rows, problem.experts) * triton.cdiv(columns, tile.block_n)
    parts = 1
    while (
        tiles * parts < AT_ONCE * device.processors
        and parts < MAX_PARTS
        and problem.inner >= 2 * parts * SHORTEST_PART
    ):
        parts *= 2
    return parts


def part_length(inner: int, tile: Tile, parts: int) -> int:
    """Returns the length of each part except the last, a multiple of the step along K."""
    return triton.cdiv(triton.cdiv(inner, tile.block_k), parts) * tile.block_k


def constants(problem: Problem, weight: Stored, tile: Tile) -> dict[str, object]:
    """Returns the constants of a kernel that multiplies rows by a quantised weight."""
    group = 0 if weight.group == weight.width else weight.group
    if weight.transposed:
        scales = "weight"
    elif group == 0:
        scales = "row"
    else:
        scales = "sums" if tile.block_m <= FEW_ROWS and tile.block_k <= group else "weight"
    return {
        "TRANSPOSED": weight.transposed,
        "FOUR_BITS": weight.four_bits,
        "HAS_ZEROS": weight.has_zeros,
        "GROUP": group,
        "SCALES": scales,
        **product_constants(problem, tile),
    }


def adding_grid(num_rows: int, width: int) -> tuple[int, int]:
    """Returns the grid of a kernel that adds partial sums of `[num_rows, width]`."""
    return triton.cdiv(num_rows, ADD_BLOCK_ROWS), triton.cdiv(width, ADD_BLOCK_COLUMNS)


def adding_constants(num_experts: int, dtype: torch.dtype) -> dict[str, object]:
    """Returns the constants of a kernel that adds partial sums for rows of a dtype."""
    return {
        "BLOCK_E": triton.next_power_of_2(num_experts + 1),
        "BLOCK_M": ADD_BLOCK_ROWS,
        "BLOCK_N": ADD_BLOCK_COLUMNS,
        "ACC": accumulator(dtype),
    }


def num_programs(
    problem: Problem, weight: Stored, tile: Tile, num_tiles: int, device: Device
) -> int:
    """Returns the size of a persistent grid: the number of programs that run concurrently."""
    if device.capability == 0:
        return min(num_tiles, device.processors)
    used = tile.num_stages * _stage_bytes(problem, weight, tile) + _block_bytes(problem, tile)
    fit = device.shared_bytes // (used + RESERVED_BYTES)
    at_once = 1 if tile.num_warps >= 8 else max(1, min(AT_ONCE, fit))
    return min(num_tiles, device.processors * at_once)


def _columns(problem: Problem, tile: Tile) -> int:
    return tile.block_n * (2 if problem.kind == "gated" else 1)


def _stage_bytes(problem: Problem, weight: Stored, tile: Tile) -> int:
    """Returns the bytes of shared memory of the operands of one step, with packed weights."""
    of_weight = _columns(problem, tile) * tile.block_k // (1 + weight.four_bits)
    return tile.block_m * tile.block_k * problem.dtype.itemsize + of_weight


def _block_bytes(problem: Problem, tile: Tile) -> int:
    """Returns the bytes of shared memory of the weights of one step as floats."""
    return _columns(problem, tile) * tile.block_k * problem.dtype.itemsize
