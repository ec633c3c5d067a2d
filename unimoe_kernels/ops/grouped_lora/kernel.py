"""Triton kernels of `grouped_lora`: a narrow product and the wide product of it, in one launch.

`y[i] = scale * wide[e] @ (narrow[e] @ x[i])`. In the forward, narrow is A and wide is B; the
gradient of x is the same computation with the transposes of B and A, applied to the gradient of y.
A program holds the narrow products of its rows in registers, so that x is read once and y written
once. These transfers are the bottleneck: with rank r there are only r operations per byte.

The kernel is for few rows per expert, which would leave most of a GPU idle. The columns of y are
therefore split among programs, and each program recomputes the narrow products of its rows: this
reads x and narrow from the L2 cache again but saves a launch. The number of splits is computed on
the device from the number of row tiles, such that one program runs on each multiprocessor; with
more, the repeated reads would slow down the others. If even a single sum is long, a preceding
launch splits the sum, and this kernel adds the partial sums in order.
Estimated, not measured: a program has about 64 KB in flight at a time, with a latency of 0.8 us, so
14336 columns take 10 us at rank 16 and 25 us at rank 64; a launch takes 2 us.

Sizes and strides of weights are compile-time constants, the number of rows is not. The compiler
then knows that a row of rank 8 is one vector of 16 bytes; of an argument it would only know whether
it is divisible by 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unimoe_kernels._triton.launch import (
    bits_to_float,
    float_bits,
    matmul_constants,
    precision,
)
from unimoe_kernels._triton.loads import load_block
from unimoe_kernels._triton.low_rank import narrow_product, num_chunks
from unimoe_kernels._triton.planned import Launch, Layout, Place, layout_of, place_of, planned
from unimoe_kernels._triton.schedule import count_row_tiles, locate_rows
from unimoe_kernels._triton.tiles import Problem, choose, num_programs, rank_columns, rows_bucket

MOST_ROWS = 64  # mean number of rows per expert, as returned by `rows_bucket`
# Once wide products are an eighth of a program's work, splitting them further gains little.
WIDE_SHARE = 8


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
    CHUNK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes `partial[c, i] = narrow[e] @ x[i]` over part c of `CHUNK_K` columns of x."""
    ends_E, tiles_E = count_row_tiles(offsets_ptr, num_rows, num_experts, BLOCK_E, BLOCK_M, False)
    num_units = tl.max(ends_E, axis=0) * BLOCK_C
    for unit in range(tl.program_id(0), num_units, tl.num_programs(0)):
        expert, start_m, end_m = locate_rows(
            unit // BLOCK_C, ends_E, tiles_E, offsets_ptr, num_rows, num_experts, BLOCK_E, BLOCK_M
        )
        tile_c = unit % BLOCK_C
        offs_m = start_m + tl.arange(0, BLOCK_M)
        acc_MR = narrow_product(
            x_ptr,
            narrow_ptr,
            expert,
            offs_m,
            offs_m < end_m,
            tile_c * CHUNK_K,
            tl.minimum(tile_c * CHUNK_K + CHUNK_K, inner),
            inner,
            rank,
            stride_narrow_e,
            stride_narrow_r,
            stride_narrow_k,
            EVEN_K,
            BLOCK_R,
            BLOCK_K,
            ACC,
            PRECISION,
            UPCAST,
        )
        partial_offs_mr = (tile_c.to(tl.int64) * num_rows + offs_m)[:, None] * BLOCK_R + tl.arange(
            0, BLOCK_R
        )[None, :]
        tl.store(partial_ptr + partial_offs_mr, acc_MR, mask=(offs_m < end_m)[:, None])


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
    BLOCK_C: tl.constexpr,
    NEEDS_Y: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PROCESSORS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes `low[i] = narrow[e] @ x[i]` and `y[i] = scale * wide[e] @ low[i]`.

    Zeros are written for rows of no expert. With `BLOCK_C > 0` the narrow products are the sums of
    as many partial sums. Low is rounded to its dtype before it is multiplied, so that the backward
    reads the values that the forward used; the scale is applied before y is rounded.
    """
    scale = bits_to_float(scale_bits, ACC)
    ends_E, tiles_E = count_row_tiles(offsets_ptr, num_rows, num_experts, BLOCK_E, BLOCK_M, True)
    num_tiles_m = tl.max(ends_E, axis=0)
    num_tiles_n = tl.cdiv(width, BLOCK_N)
    splits = tl.minimum(tl.maximum(PROCESSORS // num_tiles_m, 1), most_splits)
    tiles_of_split = tl.cdiv(num_tiles_n, splits)
    splits = tl.cdiv(num_tiles_n, tiles_of_split)
    offs_r = tl.arange(0, BLOCK_R)
    for unit in range(tl.program_id(0), num_tiles_m * splits, tl.num_programs(0)):
        expert, start_m, end_m = locate_rows(
            unit // splits, ends_E, tiles_E, offsets_ptr, num_rows, num_experts, BLOCK_E, BLOCK_M
        )
        owned = expert < num_experts
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end_m
        if BLOCK_C > 0:
            offs_c = tl.arange(0, BLOCK_C).to(tl.int64)
            partial_offs_cmr = (offs_c[:, None] * num_rows + offs_m[None, :])[:, :, None] * BLOCK_R
            partial_offs_cmr += offs_r[None, None, :]
            partial_mask_cmr = (offs_m < tl.where(owned, end_m, 0))[None, :, None]
            low_MR = tl.sum(
                tl.load(partial_ptr + partial_offs_cmr, mask=partial_mask_cmr, other=0), axis=0
            )
        else:
            low_MR = narrow_product(
                x_ptr,
                narrow_ptr,
                expert,
                offs_m,
                mask_m,
                0,
                tl.where(owned, inner, 0),
                inner,
                rank,
                stride_narrow_e,
                stride_narrow_r,
                stride_narrow_k,
                EVEN_K,
                BLOCK_R,
                BLOCK_K,
                ACC,
                PRECISION,
                UPCAST,
            )
        low_MR = low_MR.to(low_ptr.dtype.element_ty)
        split = unit % splits
        # One of the programs that share a row tile writes low; a mask costs less than a branch.
        low_mask_mr = (offs_m < tl.where(split == 0, end_m, 0))[:, None] & (offs_r < rank)[None, :]
        low_ptrs = low_ptr + offs_m.to(tl.int64)[:, None] * rank + offs_r[None, :]
        tl.store(low_ptrs, low_MR, mask=low_mask_mr)
        if NEEDS_Y:
            if UPCAST:
                low_MR = low_MR.to(ACC)
            wide_ptrs = wide_ptr + expert.to(tl.int64) * stride_wide_e
            wide_ptrs += offs_r.to(tl.int64)[:, None] * stride_wide_r
            y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * width
            first_tile_n = split * tiles_of_split
            last_tile_n = tl.minimum(first_tile_n + tiles_of_split, num_tiles_n)
            for tile_n in range(first_tile_n, last_tile_n):
                offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
                # Weights are not read for rows of no expert.
                wide_mask_n = offs_n < tl.where(owned, width, 0)
                wide_RN = load_block(
                    wide_ptrs + offs_n.to(tl.int64)[None, :] * stride_wide_n,
                    offs_r < rank,
                    wide_mask_n,
                    rank == BLOCK_R,
                    False,
                )
                if UPCAST:
                    wide_RN = wide_RN.to(ACC)
                acc_MN = tl.dot(low_MR, wide_RN, input_precision=PRECISION, out_dtype=ACC)
                y_MN = (acc_MN * scale).to(y_ptr.dtype.element_ty)
                tl.store(
                    y_ptrs + offs_n[None, :], y_MN, mask=mask_m[:, None] & (offs_n < width)[None, :]
                )


def covers(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Returns whether the kernels support these sizes: few rows, ranks that fit into registers.

    With many rows, two grouped matmuls are faster: on an H100, with 256 and 2048 rows per expert,
    torch's took 0.6 to 0.7 of the time in the forward and half of it in training. The backward uses
    the transposes, which are supported if and only if these are.
    """
    if rows_bucket(x.shape[0], lora_A.shape[0]) > MOST_ROWS:
        return False
    # Compiled for all GPUs, none of these spills registers in a loop or exceeds the available
    # shared memory. float32 without tensor cores begins to spill at 64.
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
        needs_y: Whether y is required; else it is empty.
    """
    num_rows, (_, width, rank) = x.shape[0], wide.shape
    y = x.new_empty((num_rows, width) if needs_y else (0,))
    low = x.new_empty(num_rows, rank)
    if num_rows == 0:
        return y, low
    offsets = expert_offsets.contiguous()
    sum_parts, multiply, partial_shape = _launches(
        place_of(x),
        num_rows,
        layout_of(narrow),
        layout_of(wide),
        scale,
        needs_y,
        precision(x.dtype),
    )
    partial = None
    if sum_parts is not None:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        partial = x.new_empty(partial_shape, dtype=dtype)
        sum_parts(x, narrow, partial, offsets)
    multiply(x, narrow, wide, y, low, partial, offsets)
    return y, low


@planned
def _launches(
    place: Place,
    num_rows: int,
    narrow: Layout,
    wide: Layout,
    scale: float,
    needs_y: bool,
    precision: str,
) -> tuple[Launch | None, Launch, tuple[int, ...]]:
    (num_experts, width, rank), inner, dtype = wide.shape, narrow.shape[2], narrow.dtype
    rows, tf32 = rows_bucket(num_rows, num_experts), precision == "tf32"
    problem = Problem("low_rank", inner, width, rank, num_experts, 1, dtype, rows, tf32)
    tile = choose(problem, place.gpu)
    constants = {
        "EVEN_K": inner % tile.block_k == 0,
        "BLOCK_E": triton.next_power_of_2(num_experts + 1),
        "BLOCK_R": rank_columns(rank),
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **matmul_constants(dtype),
    }
    row_tiles = num_rows // tile.block_m + num_experts + 1
    column_tiles = triton.cdiv(width, tile.block_n)
    chunks = num_chunks(problem, tile, num_rows, place.gpu)
    most_splits = column_tiles if chunks else min(column_tiles, 1 + WIDE_SHARE * width // inner)
    most_splits = most_splits if needs_y else 1
    sum_parts = None
    if chunks:
        chunk_k = triton.cdiv(inner, chunks * tile.block_k) * tile.block_k
        sum_parts = Launch(
            place,
            grouped_lora_partial_kernel,
            (num_programs(problem, tile, row_tiles * chunks, place.gpu),),
            (num_rows, num_experts, inner, rank, *narrow.strides),
            {"CHUNK_K": chunk_k, "BLOCK_C": chunks, **constants},
        )
    num_units = min(row_tiles * most_splits, max(row_tiles, place.gpu.processors))
    sizes = (num_rows, num_experts, most_splits, inner, width, rank)
    multiply = Launch(
        place,
        grouped_lora_kernel,
        (num_programs(problem, tile, num_units, place.gpu),),
        (float_bits(scale), *sizes, *narrow.strides, *wide.strides),
        {
            "BLOCK_C": chunks,
            "NEEDS_Y": needs_y,
            "PROCESSORS": place.gpu.processors,
            "BLOCK_N": tile.block_n,
            **constants,
        },
    )
    return sum_parts, multiply, (chunks, num_rows, constants["BLOCK_R"])
