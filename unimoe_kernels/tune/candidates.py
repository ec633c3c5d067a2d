"""Tiles that are worth a measurement: one or two steps from one that is known to be good."""

from __future__ import annotations

import triton

from unimoe_kernels._triton.launch import Device
from unimoe_kernels._triton.problem import Problem, Tile
from unimoe_kernels._triton.tiles import RESERVED_BYTES, buffers, stage_bytes

MAX_SIDE = 256
MAX_STAGES = 8
GROUPS = (1, 4, 8, 16)
# Numbers of the sum that a thread holds: more do not fit beside the rest into its 255 registers.
# The matrix units of sm_100 keep them in a memory of their own.
MAX_SUMS, MAX_SUMS_TENSOR_MEMORY = 128, 256


def neighbours(problem: Problem, tile: Tile, device: Device) -> list[Tile]:
    """Returns the neighbours of a tile that fit the problem and the device."""
    moves = [
        {"descriptors": not tile.descriptors},
        *({side: getattr(tile, side) * 2} for side in ("block_m", "block_n", "block_k")),
        *({side: getattr(tile, side) // 2} for side in ("block_m", "block_n", "block_k")),
        {"block_m": tile.block_m * 2, "block_n": tile.block_n // 2},
        {"block_m": tile.block_m // 2, "block_n": tile.block_n * 2},
        {"num_warps": 12 - tile.num_warps if tile.num_warps in (4, 8) else 4},
        {"block_n": tile.block_n // 2, "num_warps": 4},
        {"num_stages": tile.num_stages - 1},
        {"num_stages": tile.num_stages + 1},
        {"block_k": tile.block_k // 2, "num_stages": 2 * tile.num_stages},
        {"block_k": tile.block_k * 2, "num_stages": max(1, tile.num_stages // 2)},
        *({"group_m": group} for group in GROUPS),
    ]
    found = []
    for move in moves:
        other = _with_fewer_stages(problem, tile._replace(**move), device)
        if other != tile and other not in found and fits(problem, other, device):
            found.append(other)
    return found


def fits(problem: Problem, tile: Tile, device: Device) -> bool:
    """Returns whether a tile can run and is not larger than the matmul."""
    short = problem.dtype.itemsize == 2
    if tile.descriptors and not (device.capability >= 90 and short):
        return False
    sides = (tile.block_m, tile.block_n, tile.block_k)
    if not all(16 <= side <= MAX_SIDE for side in sides) or not 1 <= tile.num_stages <= MAX_STAGES:
        return False
    if tile.block_n > _cover(problem.width):
        return False
    if problem.kind == "weights":
        if tile.block_m > _cover(problem.height) or tile.block_k > _cover(problem.rows):
            return False
    elif tile.block_k > _cover(problem.inner) or tile.block_m > _cover(2 * problem.rows):
        return False
    halves = 2 if problem.kind == "gated" else 1
    sums = halves * tile.block_m * tile.block_n // (32 * tile.num_warps)
    tensor_memory = 100 <= device.capability < 120 and short
    if sums > (MAX_SUMS_TENSOR_MEMORY if tensor_memory else MAX_SUMS):
        return False
    return _holds(problem, tile, device)


def _with_fewer_stages(problem: Problem, tile: Tile, device: Device) -> Tile:
    """Reduces the number of stages until the tile fits into shared memory, to at least two."""
    while tile.num_stages > 2 and not _holds(problem, tile, device):
        tile = tile._replace(num_stages=tile.num_stages - 1)
    return tile


def _holds(problem: Problem, tile: Tile, device: Device) -> bool:
    held = buffers(problem, tile, device) * stage_bytes(problem, tile)
    return held <= device.shared_bytes - RESERVED_BYTES


def _cover(size: int) -> int:
    return max(16, triton.next_power_of_2(size))
