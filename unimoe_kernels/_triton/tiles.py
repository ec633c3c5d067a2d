"""Choice of tiles: measured ones from a table, an analytic choice for all other problems.

Nothing is timed when an operator runs: a launch would stall for seconds, and results would vary
from run to run. `python -m unimoe_kernels.tune` times once and writes the table; see `table.py`.

The token count enters only through the mean number of rows per expert, rounded up to a power of 2:
a kernel is compiled for a few of these buckets and never for a specific token count.
"""

from __future__ import annotations

import functools

import torch
import triton

from unimoe_kernels._triton.launch import Device, matmul_constants
from unimoe_kernels._triton.problem import MAX_ROWS, Problem, Tile
from unimoe_kernels._triton.table import Table, load

BUCKETS = tuple(2**power for power in range(MAX_ROWS.bit_length()))
SAME_RATE = {torch.float16: (torch.bfloat16,), torch.bfloat16: (torch.float16,)}
# Shared memory of a program that reductions and barriers use besides the operands of matmuls.
RESERVED_BYTES = 4096
MAX_STAGES = 4
GROUP_M = 8
# Separates the two measured expert widths, 1024 and 11008.
WIDE_EXPERT = 4096
INTERPRETED = (16, 32, 32, 2, 4, 1)


def rows_bucket(num_rows: int, num_experts: int) -> int:
    """Returns the mean number of rows per expert, rounded up to a power of 2."""
    mean = triton.cdiv(num_rows, max(1, num_experts))
    return min(MAX_ROWS, triton.next_power_of_2(max(1, mean)))


@functools.cache
def choose(problem: Problem, device: Device) -> Tile:
    """Returns the tile of a problem on a device: the measured one, else the analytic one.

    Raises:
        ValueError: If the user's table or the shipped one cannot be read.
    """
    if device.capability == 0:
        return Tile(*INTERPRETED)
    return permitted(_measured(_table(), problem, device) or analytic(problem, device))


def permitted(tile: Tile) -> Tile:
    """Returns a tile, without descriptors where the table switches them off."""
    return tile if _table().descriptors else tile._replace(descriptors=False)


@functools.cache
def _table() -> Table:
    return load()


def _measured(table: Table, problem: Problem, device: Device) -> Tile | None:
    """Looks up a problem, or the same problem with the nearest measured number of rows.

    A neighbour is used only if the analytic choice is the same for both, and only if its tile is no
    higher than the analytic one or than the rows: a tile for thousands of rows must not be used
    for a few. Both 16-bit dtypes run at the same rate, so each can use the other's measurements.
    """
    own = analytic(problem, device)
    for dtype in dict.fromkeys((problem.dtype, *SAME_RATE.get(problem.dtype, ()))):
        asked = problem._replace(dtype=dtype)
        for rows in sorted(BUCKETS, key=lambda rows: (_distance(rows, problem.rows), rows)):
            key = (device.capability, asked._replace(rows=rows))
            exact = rows == problem.rows
            if key not in table.tiles:
                continue
            if not exact and analytic(problem._replace(rows=rows), device) != own:
                continue
            tile = table.tiles[key] or own
            if exact or tile.block_m <= max(own.block_m, problem.rows):
                return tile
    return None


def _distance(a: int, b: int) -> int:
    """Returns the absolute difference of the exponents of two powers of 2."""
    return abs(a.bit_length() - b.bit_length())


def analytic(problem: Problem, device: Device) -> Tile:
    """Computes the largest tile that rows, registers and shared memory allow.

    A 16-bit matmul on an H100 requires about 300 operations for each byte read from memory, so
    tiles are as large as the registers hold (128 by 256 in 8 warps) if the rows fill them. With few
    rows, reading the weights is the bottleneck: tiles are as low as the tensor cores allow (16)
    and long along the sum, so that many loads are in flight.

    Tensor descriptors are used for large tiles of 16-bit dtypes that the tensor cores read from
    shared memory, on sm_90 and sm_100. On an H100 they were faster for every such matmul except
    the coarse `"gated_backward"`, and in 36 of 56 problems no nearby tile was faster than this
    choice; on sm_100 it has not been measured.
    """
    if problem.kind.startswith("low_rank"):
        return _analytic_low_rank(problem, device)
    if problem.dtype.itemsize > 2 and not problem.tf32:
        return _analytic_wide(problem, device)
    aligned = all(size % 16 == 0 for size in (problem.inner, problem.width, problem.height))
    if not aligned:
        # Elements are read one by one, so addresses occupy the registers.
        block_m = 64 if problem.rows > 32 or problem.kind == "weights" else 16
        shape = (block_m, 32 if problem.kind == "gated_backward" else 64, 32, 4)
    elif problem.kind == "weights":
        tall, broad = problem.height > 64, problem.width > 128
        shape = (128 if tall else 64, 256 if tall and broad else 128, 64, 8 if tall else 4)
    elif problem.rows <= 32:
        shape = (16 if problem.rows <= 16 else 32, 64, 128, 4)
    elif problem.rows <= 64:
        shape = (64, 128, 64, 4)
    else:
        shape = (128, 256, 64, 8)
    block_m, block_n, block_k, num_warps = shape
    block_k = block_k * 2 // problem.dtype.itemsize
    if problem.tf32 or not 90 <= device.capability < 120:
        # Outside sm_90 and sm_100, tensor cores read operands from registers; 4-byte dtypes use
        # more of them everywhere.
        block_n = min(block_n, 128)
    if problem.kind == "gated":
        block_n //= 2  # of each half
    large = aligned and block_m >= 64 and problem.dtype.itemsize == 2
    if problem.kind == "gated_backward":
        if large and problem.rows > 64 and device.capability == 90:
            return _fit(problem, device, _hopper_gated_backward(problem))
        # Gate and up occupy registers besides the sums.
        block_n = min(block_n, 64 if problem.tf32 else 128)
    tile = Tile(block_m, block_n, block_k, GROUP_M, num_warps, MAX_STAGES)
    descriptors = large and 90 <= device.capability < 120
    return _fit(problem, device, tile._replace(descriptors=descriptors))


def _hopper_gated_backward(problem: Problem) -> Tile:
    """Returns the fastest tile on an H100: 5 to 29 % faster than 128 by 128 in four stages."""
    if problem.width >= WIDE_EXPERT:
        return Tile(128, 256, 64, GROUP_M, 8, MAX_STAGES)
    if problem.rows <= 512:
        return Tile(64, 256, 64, GROUP_M, 8, MAX_STAGES, True)
    return Tile(128, 128, 64, 2 * GROUP_M, 8, 6, True)


def _analytic_wide(problem: Problem, device: Device) -> Tile:
    # float32 without TF32 and float64 do not run on tensor cores: registers limit the tile.
    low = problem.kind != "weights" and problem.rows <= 32
    side = 64 if problem.dtype == torch.float32 else 32
    block_n = side // 2 if problem.kind == "gated" else side
    tile = Tile(16 if low else side, block_n, 16, GROUP_M, 4, 3)
    return _fit(problem, device, tile)


def rank_columns(rank: int) -> int:
    """Returns the number of columns that a LoRA rank is padded to: a power of 2, at least 16."""
    return max(16, triton.next_power_of_2(rank))


def _analytic_low_rank(problem: Problem, device: Device) -> Tile:
    """Returns the tile of a low-rank product, whose bottleneck is reading and writing rows.

    Row tiles are about as high as the rank; with lower ones most of the data read would be the
    weights, which each tile reads from the L2 cache. With few rows, long steps along the sum keep
    enough loads in flight.
    """
    rank, few = rank_columns(problem.height), problem.rows <= 32
    low = 16 if problem.rows <= 16 else 32
    stages, num_warps = MAX_STAGES, 4
    if problem.dtype.itemsize > 2 and not problem.tf32:
        side = 64 if problem.dtype == torch.float32 else 32
        block_m, block_n, block_k, stages = low if few else side, side, 16, 3
    elif few:
        block_m, block_n, block_k = low, 128 if rank <= 64 else 64, 256 if rank <= 32 else 128
    else:
        block_m, block_n, block_k = 64, 128 if rank <= 64 else 64, 128 if rank <= 32 else 64
    if problem.kind == "low_rank_weights":
        # Columns of the rows times the rank, summed over rows. Tiles are narrow, so that a single
        # expert with most of the rows still has one for every multiprocessor.
        block_m, block_n, block_k = max(block_m, 128 if rank > 32 else 64), rank, min(block_k, 64)
        num_warps = 8 if rank > 64 else 4
    if problem.tf32:
        block_n, block_k = min(block_n, 64), block_k // 2
    return _fit(problem, device, Tile(block_m, block_n, block_k, GROUP_M, num_warps, stages))


def _fit(problem: Problem, device: Device, tile: Tile) -> Tile:
    """Narrows a tile to the matmul, then uses as many stages as shared memory holds."""
    block_n = min(tile.block_n, max(16, triton.next_power_of_2(problem.width)))
    block_k = tile.block_k
    if not problem.kind.endswith("weights"):
        block_k = min(block_k, max(16, triton.next_power_of_2(problem.inner)))
    tile = tile._replace(block_n=block_n, block_k=block_k)
    while True:
        most = (device.shared_bytes - RESERVED_BYTES) // stage_bytes(problem, tile)
        if most >= 2 or tile.block_k <= 16:
            break
        tile = tile._replace(block_k=tile.block_k // 2)
    most += not _reads_shared(problem, tile, device)
    return tile._replace(num_stages=max(1, min(tile.num_stages, most)))


def buffers(problem: Problem, tile: Tile, device: Device) -> int:
    """Returns the number of steps along the sum whose operands are in shared memory at a time.

    This is one less than the number of stages if the operands of the current product are in
    registers.
    """
    return max(1, tile.num_stages - (not _reads_shared(problem, tile, device)))


def _reads_shared(problem: Problem, tile: Tile, device: Device) -> bool:
    """Returns whether tensor cores read operands from shared memory (wgmma and tcgen05)."""
    if problem.kind.startswith("low_rank"):
        return True  # one buffer less, which leaves space for the second product
    wide = problem.dtype.itemsize > 2 and not problem.tf32
    return 90 <= device.capability < 120 and tile.block_m >= 64 and not wide


def stage_bytes(problem: Problem, tile: Tile) -> int:
    """Returns the shared memory of the operands of one step along the sum, in bytes."""
    columns = tile.block_n * (2 if problem.kind == "gated" else 1)
    numbers = (tile.block_m + columns) * tile.block_k
    if problem.kind == "low_rank":
        # The larger of the narrow product and the wide one.
        rank = rank_columns(problem.height)
        numbers = max((tile.block_m + rank) * tile.block_k, rank * tile.block_n)
    return numbers * problem.dtype.itemsize


def product_constants(problem: Problem, tile: Tile) -> dict[str, object]:
    """Returns the constants of a kernel that multiplies rows by the weights of their experts."""
    return {
        "EVEN_N": problem.width % tile.block_n == 0,
        "EVEN_K": problem.inner % tile.block_k == 0,
        "BLOCK_E": triton.next_power_of_2(problem.experts + 1),
        **tile.constants(),
        **matmul_constants(problem.dtype),
    }


def num_programs(problem: Problem, tile: Tile, num_tiles: int, device: Device) -> int:
    """Returns the size of a persistent grid: the number of programs that run concurrently."""
    if device.capability == 0:
        return min(num_tiles, device.processors)
    # Eight warps fill the registers of a multiprocessor; several smaller programs share one.
    used = tile.num_stages * stage_bytes(problem, tile)
    at_once = 1 if tile.num_warps >= 8 else max(1, min(4, device.shared_bytes // used))
    return min(num_tiles, device.processors * at_once)
