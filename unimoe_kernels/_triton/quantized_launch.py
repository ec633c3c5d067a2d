"""How products with weights of few bits are launched: their constants, tiles, parts and grids."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from unimoe_kernels._triton.launch import Device
from unimoe_kernels._triton.problem import Problem, Tile
from unimoe_kernels._triton.tiles import (
    GROUP_M,
    INTERPRETED,
    MAX_STAGES,
    RESERVED_BYTES,
    permitted,
    product_constants,
)

# Rows of an expert up to which its weights are read, not multiplied, most of the time.
FEW_ROWS = 32
# A part of a sum that is cut is no shorter.
SHORTEST_PART = 512
MAX_PARTS = 8
# Programs that a processor runs at once, of those for few rows.
AT_ONCE = 4


class Stored(NamedTuple):
    """A quantised weight as the choice of its kernel sees it.

    Attributes:
        experts: E.
        rows: of one expert, as they are stored.
        width: numbers of a row.
        group: numbers that share a scale.
        four_bits: two integers in a byte, or int8.
        has_zeros: whether groups have zero points.
        transposed: whether it is multiplied along its rows, not along its columns.
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
    """Returns how a weight `[E, out, in]` is stored."""
    experts, rows, width = values.shape
    four_bits = values.dtype == torch.uint8
    width *= 1 + four_bits
    return Stored(
        experts, rows, width, width // scales.shape[2], four_bits, zeros is not None, transposed
    )


def choose(problem: Problem, weight: Stored, device: Device) -> Tile:
    """Returns the tile of a product: by arithmetic alone, nothing was measured yet.

    Few rows: as low as the tensor cores allow, with a group in each step where groups have 64
    numbers or more, so that the sums are scaled and not the numbers. Many rows: the numbers of a
    step pass through registers on their way to shared memory, so that tiles are half as wide as
    those of floats.
    """
    if device.capability == 0:
        return Tile(*INTERPRETED)
    few, width = problem.rows <= FEW_ROWS, problem.width
    if problem.dtype.itemsize > 2:
        side = 64 if problem.dtype == torch.float32 else 32
        shape = (16 if few else side, side, 16, 4)
    elif problem.inner % 16 or width % 16:
        # Numbers are read one by one, so that addresses take the registers.
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
    """Returns into how many parts the sums are cut, a power of 2: 1 where tiles are enough.

    A few rows of narrow experts have fewer tiles than a GPU runs at a time.
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
    """Returns the numbers of each part but the last: whole steps."""
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


def num_programs(
    problem: Problem, weight: Stored, tile: Tile, num_tiles: int, device: Device
) -> int:
    """Returns the size of a persistent grid: as many programs as run at the same time."""
    if device.capability == 0:
        return min(num_tiles, device.processors)
    used = tile.num_stages * _stage_bytes(problem, weight, tile) + _block_bytes(problem, tile)
    fit = device.shared_bytes // (used + RESERVED_BYTES)
    at_once = 1 if tile.num_warps >= 8 else max(1, min(AT_ONCE, fit))
    return min(num_tiles, device.processors * at_once)


def _columns(problem: Problem, tile: Tile) -> int:
    return tile.block_n * (2 if problem.kind == "gated" else 1)


def _stage_bytes(problem: Problem, weight: Stored, tile: Tile) -> int:
    """Returns the shared memory of the operands of one step, as they are read."""
    of_weight = _columns(problem, tile) * tile.block_k // (1 + weight.four_bits)
    return tile.block_m * tile.block_k * problem.dtype.itemsize + of_weight


def _block_bytes(problem: Problem, tile: Tile) -> int:
    """Returns the shared memory of a step's numbers as floats."""
    return _columns(problem, tile) * tile.block_k * problem.dtype.itemsize
