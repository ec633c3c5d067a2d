"""The shape of tiles: measured ones from a table, an analytic choice for everything else.

Nothing is timed when an operator runs: a launch would stall for seconds, and results would vary
from run to run. `python -m unimoe_kernels.tune` times once and writes the table; see `table.py`.

The number of tokens enters only by the mean number of rows of an expert, rounded to a power of 2:
a kernel is compiled for a few of these buckets and never for a token count.
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
# Of a program's shared memory, what reductions and barriers take beside the operands of matmuls.
RESERVED_BYTES = 4096
MAX_STAGES = 4
GROUP_M = 8
# Where the measured experts of 1024 columns and those of 11008 part.
WIDE_EXPERT = 4096
INTERPRETED = (16, 32, 32, 2, 4, 1)


def rows_bucket(num_rows: int, num_experts: int) -> int:
    """Returns the mean number of rows of an expert, rounded up to a power of 2."""
    mean = triton.cdiv(num_rows, max(1, num_experts))
    return min(MAX_ROWS, triton.next_power_of_2(max(1, mean)))


@functools.cache
def choose(problem: Problem, device: Device) -> Tile:
    """Returns the tile of a problem on a device: the measured one, else the analytic one.

    Raises:
        ValueError: If the table of the user or the shipped one cannot be read.
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
    """Looks a problem up: itself, else as the nearest number of rows that was measured.

    A neighbour counts only where the analytic choice sees no difference, and only a tile that is no
    higher than its own or than the rows: what is right for thousands of rows must not be taken for
    a few. Both 16-bit types run at the same rate, so that each answers for the other.
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
    """Returns how many doublings lie between two powers of 2."""
    return abs(a.bit_length() - b.bit_length())


def analytic(problem: Problem, device: Device) -> Tile:
    """Chooses by arithmetic: the largest tile that rows, registers and shared memory allow.

    A matmul of 16-bit numbers on an H100 needs some 300 operations for each byte that comes from
    memory, so tiles are as large as the registers hold (128 by 256 in 8 warps) where the rows fill
    them. Few rows are bound by reading weights: tiles are as low as the tensor cores allow (16)
    and long along the sum, so that much is in flight.

    Tensor descriptors are asked for where large tiles of 16-bit numbers go from shared memory to
    the matrix units, on sm_90 and sm_100. On an H100 they were the faster form of every such matmul
    but the coarse `"gated_backward"`, and nothing nearby was better than this choice in 36 of 56
    problems; on sm_100 it is not measured.
    """
    if problem.kind.startswith("low_rank"):
        return _analytic_low_rank(problem, device)
    if problem.dtype.itemsize > 2 and not problem.tf32:
        return _analytic_wide(problem, device)
    aligned = all(size % 16 == 0 for size in (problem.inner, problem.width, problem.height))
    if not aligned:
        # Numbers are read one by one, so that addresses take the registers.
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
        # Outside of sm_90 and sm_100 the matrix units take operands from registers; numbers of
        # four bytes take more of them everywhere.
        block_n = min(block_n, 128)
    if problem.kind == "gated":
        block_n //= 2  # of each half
    large = aligned and block_m >= 64 and problem.dtype.itemsize == 2
    if problem.kind == "gated_backward":
        if large and problem.rows > 64 and device.capability == 90:
            return _fit(problem, device, _hopper_gated_backward(problem))
        block_n = min(block_n, 64 if problem.tf32 else 128)  # beside the sums lie gate and up
    tile = Tile(block_m, block_n, block_k, GROUP_M, num_warps, MAX_STAGES)
    descriptors = large and 90 <= device.capability < 120
    return _fit(problem, device, tile._replace(descriptors=descriptors))


def _hopper_gated_backward(problem: Problem) -> Tile:
    """What was fastest on an H100: 5 to 29 % over tiles of 128 by 128 in four stages."""
    if problem.width >= WIDE_EXPERT:
        return Tile(128, 256, 64, GROUP_M, 8, MAX_STAGES)
    if problem.rows <= 512:
        return Tile(64, 256, 64, GROUP_M, 8, MAX_STAGES, True)
    return Tile(128, 128, 64, 2 * GROUP_M, 8, 6, True)


def _analytic_wide(problem: Problem, device: Device) -> Tile:
    # float32 without TF32 and float64 run on the ordinary units: registers bound the tile.
    low = problem.kind != "weights" and problem.rows <= 32
    side = 64 if problem.dtype == torch.float32 else 32
    block_n = side // 2 if problem.kind == "gated" else side
    tile = Tile(16 if low else side, block_n, 16, GROUP_M, 4, 3)
    return _fit(problem, device, tile)


def rank_columns(rank: int) -> int:
    """Returns as how many columns a rank is multiplied: a power of 2, of which 16 are the least."""
    return max(16, triton.next_power_of_2(rank))


def _analytic_low_rank(problem: Problem, device: Device) -> Tile:
    """Tiles of products that are as narrow as a rank: bound by reading and by writing rows.

    Row tiles are about as high as the rank, or the weights, which each of them reads from the L2
    cache, would be most of what is read. Long steps have enough under way where rows are few.
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
        # Columns of the rows by the rank, summed over rows. Narrow, so that one expert with most
        # of the rows still has tiles for every processor.
        block_m, block_n, block_k = max(block_m, 128 if rank > 32 else 64), rank, min(block_k, 64)
        num_warps = 8 if rank > 64 else 4
    if problem.tf32:
        block_n, block_k = min(block_n, 64), block_k // 2
    return _fit(problem, device, Tile(block_m, block_n, block_k, GROUP_M, num_warps, stages))


def _fit(problem: Problem, device: Device, tile: Tile) -> Tile:
    """Narrows a tile to the matmul, then takes as many stages as shared memory holds."""
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
    """Returns of how many steps along the sum the operands are in shared memory at a time.

    One step less than there are stages, where the operands of a product are in registers by then.
    """
    return max(1, tile.num_stages - (not _reads_shared(problem, tile, device)))


def _reads_shared(problem: Problem, tile: Tile, device: Device) -> bool:
    """Returns whether the matrix units read operands from shared memory: wgmma and tcgen05."""
    if problem.kind.startswith("low_rank"):
        return True  # one buffer less, and room for the second product
    wide = problem.dtype.itemsize > 2 and not problem.tf32
    return 90 <= device.capability < 120 and tile.block_m >= 64 and not wide


def stage_bytes(problem: Problem, tile: Tile) -> int:
    """Returns the shared memory of the operands of one step along the sum."""
    columns = tile.block_n * (2 if problem.kind == "gated" else 1)
    numbers = (tile.block_m + columns) * tile.block_k
    if problem.kind == "low_rank":
        # Of the narrow product, then of the wide one.
        rank = rank_columns(problem.height)
        numbers = max((tile.block_m + rank) * tile.block_k, rank * tile.block_n)
    return numbers * problem.dtype.itemsize


def product_constants(problem: Problem, tile: Tile) -> dict[str, object]:
    """Returns the constants of a kernel that multiplies rows with the weights of their experts."""
    return {
        "EVEN_N": problem.width % tile.block_n == 0,
        "EVEN_K": problem.inner % tile.block_k == 0,
        "BLOCK_E": triton.next_power_of_2(problem.experts + 1),
        **tile.constants(),
        **matmul_constants(problem.dtype),
    }


def num_programs(problem: Problem, tile: Tile, num_tiles: int, device: Device) -> int:
    """Returns the size of a persistent grid: as many programs as run at the same time."""
    if device.capability == 0:
        return min(num_tiles, device.processors)
    # Eight warps fill the registers of a processor; of smaller programs several share one.
    used = tile.num_stages * stage_bytes(problem, tile)
    at_once = 1 if tile.num_warps >= 8 else max(1, min(4, device.shared_bytes // used))
    return min(num_tiles, device.processors * at_once)
