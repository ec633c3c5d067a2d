"""Triton kernels of `grouped_lora`: a narrow product and the wide one that follows, in one launch.

`y[i] = scale * wide[e] @ (narrow[e] @ x[i])`. Forward, narrow is A and wide is B; the gradient of x
is the same with the transposes of B and A, on the gradient of y. A program holds the narrow
products of its rows in registers, so that x is read once and y written once, which is all that
takes time: with r columns there are r operations for each byte.

Few rows would leave most of a GPU idle. Then the columns of y are shared out, and each program
makes the narrow products of its rows anew: that reads x and narrow from the L2 cache again, and
saves a launch. How often is worked out on the device from the number of row tiles, until one
program runs on each processor; beyond that, reading again would slow down the others. Where even
one sum is long, a launch before this one shares out the sum, and this one adds its parts in order.
By arithmetic, not measured: a program has some 64 KB under way at a time and waits 0.8 us for it,
so that 14336 columns take it 10 us at rank 16 and 25 us at rank 64, where a launch takes 2 us.

Sizes and the strides of weights are constants of a kernel, the number of rows is not. A rank of 8
is then known to be one vector of 16 bytes; an argument would only say whether 16 divides it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unimoe_kernels._triton.launch import (
    Device,
    bits_to_float,
    device_of,
    float_bits,
    matmul_constants,
    precision,
)
from unimoe_kernels._triton.schedule import count_row_tiles, locate_rows
from unimoe_kernels._triton.tiles import (
    Problem,
    Tile,
    choose,
    num_programs,
    rank_columns,
    rows_bucket,
)

LONG_SUM = 2**17  # numbers of one expert's narrow weight
PARTIAL_ELEMENTS = 8192  # that a program adds up: 64 registers a thread
MAX_CHUNKS = 8
# Once a program spends an eighth on wide products, sharing these out further gains little.
WIDE_SHARE = 8


@triton.jit
def load_block(ptrs, rows, columns, EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr):
    """Loads the `rows` and `columns` of a block that exist, zeros elsewhere."""
    if EVEN_ROWS and EVEN_COLUMNS:
        return tl.load(ptrs)
    elif EVEN_COLUMNS:
        return tl.load(ptrs, mask=rows[:, None], other=0)
    elif EVEN_ROWS:
        return tl.load(ptrs, mask=columns[None, :], other=0)
    else:
        return tl.load(ptrs, mask=rows[:, None] & columns[None, :], other=0)


@triton.jit
def narrow_product(
    x_ptr,
    narrow_ptr,
    expert,
    row,
    exists,
    begin,
    end,
    inner: tl.constexpr,
    rank: tl.constexpr,
    stride_e,
    stride_r: tl.constexpr,
    stride_k: tl.constexpr,
    EVEN_K: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Returns `[M, RANK]`: rows of x times narrow, summed over columns from begin to end."""
    step = begin + tl.arange(0, BLOCK_K)
    column = tl.arange(0, RANK)
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * inner + step[None, :]
    narrow_ptrs = narrow_ptr + expert.to(tl.int64) * stride_e
    narrow_ptrs += column.to(tl.int64)[None, :] * stride_r
    narrow_ptrs += step.to(tl.int64)[:, None] * stride_k
    total = tl.zeros((row.shape[0], RANK), dtype=ACC)
    for k in range(begin, end, BLOCK_K):
        known = step < inner - (k - begin)
        x = load_block(x_ptrs, exists, known, False, EVEN_K)
        narrow = load_block(narrow_ptrs, known, column < rank, EVEN_K, rank == RANK)
        if UPCAST:
            x, narrow = x.to(ACC), narrow.to(ACC)
        total = tl.dot(x, narrow, total, input_precision=PRECISION, out_dtype=ACC)
        x_ptrs += BLOCK_K
        narrow_ptrs += BLOCK_K * stride_k
    return total


@triton.jit(do_not_specialize=["num_rows"])
def grouped_lora_partial_kernel(
    x_ptr,
    narrow_ptr,
    partial_ptr,
    offsets_ptr,
    num_rows,
    num_experts,
    inner: tl.constexpr,
    rank: tl.constexpr,
    stride_narrow_e,
    stride_narrow_r: tl.constexpr,
    stride_narrow_k: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    EVEN_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes `partial[c, i] = narrow[e] @ x[i]` over chunk c of `CHUNK` columns of x."""
    ends, tiles = count_row_tiles(offsets_ptr, num_rows, num_experts, EXPERTS, BLOCK_M, False)
    num_units = tl.max(ends, axis=0) * CHUNKS
    for unit in range(tl.program_id(0), num_units, tl.num_programs(0)):
        expert, first_row, end_row = locate_rows(
            unit // CHUNKS, ends, tiles, offsets_ptr, num_rows, num_experts, EXPERTS, BLOCK_M
        )
        chunk = unit % CHUNKS
        row = first_row + tl.arange(0, BLOCK_M)
        total = narrow_product(
            x_ptr,
            narrow_ptr,
            expert,
            row,
            row < end_row,
            chunk * CHUNK,
            tl.minimum(chunk * CHUNK + CHUNK, inner),
            inner,
            rank,
            stride_narrow_e,
            stride_narrow_r,
            stride_narrow_k,
            EVEN_K,
            RANK,
            BLOCK_K,
            ACC,
            PRECISION,
            UPCAST,
        )
        place = (chunk.to(tl.int64) * num_rows + row)[:, None] * RANK + tl.arange(0, RANK)[None, :]
        tl.store(partial_ptr + place, total, mask=(row < end_row)[:, None])


@triton.jit(do_not_specialize=["num_rows", "scale_bits"])
def grouped_lora_kernel(
    x_ptr,
    narrow_ptr,
    wide_ptr,
    y_ptr,
    low_ptr,
    partial_ptr,
    offsets_ptr,
    scale_bits,
    num_rows,
    num_experts,
    most_splits,
    inner: tl.constexpr,
    width: tl.constexpr,
    rank: tl.constexpr,
    stride_narrow_e,
    stride_narrow_r: tl.constexpr,
    stride_narrow_k: tl.constexpr,
    stride_wide_e,
    stride_wide_n: tl.constexpr,
    stride_wide_r: tl.constexpr,
    CHUNKS: tl.constexpr,
    NEEDS_Y: tl.constexpr,
    EVEN_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    PROCESSORS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes `low[i] = narrow[e] @ x[i]` and `y[i] = scale * wide[e] @ low[i]`.

    Rows of no expert get zeros. With `CHUNKS > 0` the narrow products come from as many partial
    sums. Low is rounded to its dtype before it is multiplied, so that a backward which reads it
    sees what the forward has used; the scale meets sums that are not rounded yet.
    """
    scale = bits_to_float(scale_bits, ACC)
    ends, tiles = count_row_tiles(offsets_ptr, num_rows, num_experts, EXPERTS, BLOCK_M, True)
    num_row_tiles = tl.max(ends, axis=0)
    column_tiles = tl.cdiv(width, BLOCK_N)
    splits = tl.minimum(tl.maximum(PROCESSORS // num_row_tiles, 1), most_splits)
    tiles_of_split = tl.cdiv(column_tiles, splits)
    splits = tl.cdiv(column_tiles, tiles_of_split)
    narrow_column = tl.arange(0, RANK)
    for unit in range(tl.program_id(0), num_row_tiles * splits, tl.num_programs(0)):
        expert, first_row, end_row = locate_rows(
            unit // splits, ends, tiles, offsets_ptr, num_rows, num_experts, EXPERTS, BLOCK_M
        )
        owned = expert < num_experts
        row = first_row + tl.arange(0, BLOCK_M)
        exists = row < end_row
        if CHUNKS > 0:
            chunk = tl.arange(0, CHUNKS).to(tl.int64)
            place = (chunk[:, None] * num_rows + row[None, :])[:, :, None] * RANK
            place += narrow_column[None, None, :]
            mask = (row < tl.where(owned, end_row, 0))[None, :, None]
            low = tl.sum(tl.load(partial_ptr + place, mask=mask, other=0), axis=0)
        else:
            low = narrow_product(
                x_ptr,
                narrow_ptr,
                expert,
                row,
                exists,
                0,
                tl.where(owned, inner, 0),
                inner,
                rank,
                stride_narrow_e,
                stride_narrow_r,
                stride_narrow_k,
                EVEN_K,
                RANK,
                BLOCK_K,
                ACC,
                PRECISION,
                UPCAST,
            )
        low = low.to(low_ptr.dtype.element_ty)
        split = unit % splits
        # One of those that share a row tile writes low; a mask is not worth a branch.
        kept = (row < tl.where(split == 0, end_row, 0))[:, None] & (narrow_column < rank)[None, :]
        low_ptrs = low_ptr + row.to(tl.int64)[:, None] * rank + narrow_column[None, :]
        tl.store(low_ptrs, low, mask=kept)
        if NEEDS_Y:
            if UPCAST:
                low = low.to(ACC)
            wide_ptrs = wide_ptr + expert.to(tl.int64) * stride_wide_e
            wide_ptrs += narrow_column.to(tl.int64)[:, None] * stride_wide_r
            y_ptrs = y_ptr + row.to(tl.int64)[:, None] * width
            first_tile = split * tiles_of_split
            last_tile = tl.minimum(first_tile + tiles_of_split, column_tiles)
            for column_tile in range(first_tile, last_tile):
                column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
                # No weight is read for rows of no expert.
                inside = column < tl.where(owned, width, 0)
                wide = load_block(
                    wide_ptrs + column.to(tl.int64)[None, :] * stride_wide_n,
                    narrow_column < rank,
                    inside,
                    rank == RANK,
                    False,
                )
                if UPCAST:
                    wide = wide.to(ACC)
                total = tl.dot(low, wide, input_precision=PRECISION, out_dtype=ACC)
                y = (total * scale).to(y_ptr.dtype.element_ty)
                tl.store(
                    y_ptrs + column[None, :], y, mask=exists[:, None] & (column < width)[None, :]
                )


def covers(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Returns whether the kernels take these sizes: nothing empty, ranks that fit into registers.

    A backward has the transposes, which are covered if and only if these are.
    """
    # Compiled for all GPUs, none of these spills registers in a loop or takes more shared memory
    # than there is. Float32 on the ordinary units begins to spill at 64.
    widest = 128 if x.dtype.itemsize == 2 else 32
    if precision(x.dtype) == "tf32":
        widest = 64
    return lora_A.shape[1] <= widest and lora_A.numel() > 0 and lora_B.numel() > 0


def grouped_lora(
    x: Tensor,
    narrow: Tensor,
    wide: Tensor,
    expert_offsets: Tensor,
    scale: float,
    needs_y: bool = True,
) -> tuple[Tensor, Tensor]:
    """Returns `y[i] = scale * wide[e] @ low[i]`, and `low[i] = narrow[e] @ x[i]`.

    Args:
        x: `[N, D]`, contiguous.
        narrow: `[E, r, D]`, any strides.
        wide: `[E, F, r]`, any strides.
        expert_offsets: `[E + 1]`.
        scale: Factor of y.
        needs_y: Whether y is wanted; else it is empty.
    """
    (num_rows, inner), (num_experts, width, rank) = x.shape, wide.shape
    y = x.new_empty((num_rows, width) if needs_y else (0,))
    low = x.new_empty(num_rows, rank)
    if num_rows == 0:
        return y, low
    device, offsets = device_of(x), expert_offsets.contiguous()
    tf32 = precision(x.dtype) == "tf32"
    rows = rows_bucket(num_rows, num_experts)
    problem = Problem("low_rank", inner, width, rank, num_experts, 1, x.dtype, rows, tf32)
    tile = choose(problem, device)
    sizes = {
        "EVEN_K": inner % tile.block_k == 0,
        "EXPERTS": triton.next_power_of_2(num_experts + 1),
        "RANK": rank_columns(rank),
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **matmul_constants(x.dtype),
    }
    row_tiles = num_rows // tile.block_m + num_experts + 1
    column_tiles = triton.cdiv(width, tile.block_n)
    chunks = num_chunks(problem, tile, num_rows, device)
    most_splits = column_tiles if chunks else min(column_tiles, 1 + WIDE_SHARE * width // inner)
    most_splits = most_splits if needs_y else 1
    partial = None
    with torch.cuda.device_of(x):
        if chunks:
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            partial = x.new_empty(chunks, num_rows, sizes["RANK"], dtype=dtype)
            programs = num_programs(problem, tile, row_tiles * chunks, device)
            grouped_lora_partial_kernel[(programs,)](
                x,
                narrow,
                partial,
                offsets,
                num_rows,
                num_experts,
                inner,
                rank,
                *narrow.stride(),
                CHUNK=triton.cdiv(inner, chunks * tile.block_k) * tile.block_k,
                CHUNKS=chunks,
                **sizes,
            )
        num_units = min(row_tiles * most_splits, max(row_tiles, device.processors))
        grouped_lora_kernel[(num_programs(problem, tile, num_units, device),)](
            x,
            narrow,
            wide,
            y,
            low,
            partial,
            offsets,
            float_bits(scale),
            num_rows,
            num_experts,
            most_splits,
            inner,
            width,
            rank,
            *narrow.stride(),
            *wide.stride(),
            CHUNKS=chunks,
            NEEDS_Y=needs_y,
            PROCESSORS=device.processors,
            BLOCK_N=tile.block_n,
            **sizes,
        )
    return y, low


def num_chunks(problem: Problem, tile: Tile, num_rows: int, device: Device) -> int:
    """Returns into how many parts, a power of 2, a launch of its own cuts the narrow sums, or 0."""
    row_tiles = min(num_rows, num_rows // tile.block_m + problem.experts)
    rank = rank_columns(problem.height)
    chunks = min(MAX_CHUNKS, PARTIAL_ELEMENTS // (tile.block_m * rank))
    worth_it = 2 * row_tiles <= device.processors and rank * problem.inner >= LONG_SUM
    return chunks if worth_it and chunks > 1 else 0
