"""Triton kernels of `grouped_mm_quantized`.

Like those of `grouped_mm`, but weights are converted to floats after they are loaded. Where few
rows and narrow experts give too few tiles to fill a GPU, the sums are split into parts, which a
second kernel adds in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unimoe_kernels._triton import quantized_launch
from unimoe_kernels._triton.descriptors import Source, rows_source
from unimoe_kernels._triton.launch import precision
from unimoe_kernels._triton.planned import Launch, Layout, Place, layout_of, place_of, planned
from unimoe_kernels._triton.problem import Problem, Tile
from unimoe_kernels._triton.quantized import expert_of_rows, multiply_quantized_rows
from unimoe_kernels._triton.quantized_launch import Stored, stored
from unimoe_kernels._triton.schedule import count_row_tiles, locate_rows, locate_tile
from unimoe_kernels._triton.tiles import rows_bucket


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def grouped_mm_quantized_kernel(
    x_source,
    values_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    y_ptr,
    offsets_ptr,
    row_order_ptr,
    num_rows,
    num_parts,
    num_experts,
    inner,
    width,
    stored_rows,
    part_length,
    X_FORM: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TAIL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    FOUR_BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes `y[i] = weight[e] @ x[i] + bias[e]`; with `TAIL` also zeros for rows of no expert.

    If the sums are split, each partial sum is written to `y[part, i]`.
    """
    ends_E, tiles_E = count_row_tiles(offsets_ptr, num_rows, num_experts, BLOCK_E, BLOCK_M, TAIL)
    num_tiles_m = tl.max(ends_E, axis=0)
    num_tiles_n = tl.cdiv(width, BLOCK_N)
    num_tiles = num_tiles_m * num_tiles_n
    for index in range(tl.program_id(0), num_tiles * num_parts, tl.num_programs(0)):
        part = index // num_tiles
        tile_m, tile_n = locate_tile(index % num_tiles, num_tiles_m, num_tiles_n, GROUP_M)
        expert, start_m, end_m = locate_rows(
            tile_m, ends_E, tiles_E, offsets_ptr, num_rows, num_experts, BLOCK_E, BLOCK_M
        )
        acc_MN, _ = multiply_quantized_rows(
            x_source,
            values_ptr,
            scales_ptr,
            zeros_ptr,
            row_order_ptr,
            expert,
            start_m,
            end_m,
            tile_n * BLOCK_N,
            part * part_length,
            tl.minimum((part + 1) * part_length, inner),
            num_experts,
            inner,
            width,
            0,
            stored_rows,
            X_FORM,
            TOP_K,
            TRANSPOSED,
            FOUR_BITS,
            HAS_ZEROS,
            GROUP,
            SCALES,
            False,
            EVEN_N,
            EVEN_K,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            ACC,
            PRECISION,
            UPCAST,
        )
        offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        if HAS_BIAS:
            bias_mask_n = offs_n < tl.where(expert < num_experts, width, 0)
            bias_N = tl.load(
                bias_ptr + expert.to(tl.int64) * width + offs_n, mask=bias_mask_n, other=0
            )
            acc_MN += bias_N.to(ACC)[None, :]
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_mn = (offs_m < end_m)[:, None] & (offs_n < width)[None, :]
        offs_m = part.to(tl.int64) * num_rows + offs_m
        y_ptrs = y_ptr + offs_m[:, None] * width + offs_n[None, :]
        tl.store(y_ptrs, acc_MN.to(y_ptr.dtype.element_ty), mask=mask_mn)


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def add_parts_kernel(
    parts_ptr,
    bias_ptr,
    y_ptr,
    offsets_ptr,
    num_rows,
    num_parts,
    num_experts,
    width,
    HAS_BIAS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    """Adds the partial sums in order, and the bias; rows of no expert are zeros."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < width
    owned_m = offs_m < tl.load(offsets_ptr + num_experts)
    mask_mn = owned_m[:, None] & mask_n[None, :]
    offs_mn = offs_m.to(tl.int64)[:, None] * width + offs_n[None, :]
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    parts_ptrs = parts_ptr + offs_mn
    for _ in range(0, num_parts):
        acc_MN += tl.load(parts_ptrs, mask=mask_mn, other=0)
        parts_ptrs += tl.cast(num_rows, tl.int64) * width
    if HAS_BIAS:
        expert_M = expert_of_rows(offsets_ptr, offs_m, num_experts, BLOCK_E)
        bias_ptrs = bias_ptr + expert_M[:, None] * width + offs_n[None, :]
        acc_MN += tl.load(bias_ptrs, mask=mask_mn, other=0).to(ACC)
    mask_mn = (offs_m < num_rows)[:, None] & mask_n[None, :]
    tl.store(y_ptr + offs_mn, acc_MN.to(y_ptr.dtype.element_ty), mask=mask_mn)


def grouped_mm_quantized(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    expert_offsets: Tensor,
    bias: Tensor | None,
    transposed: bool = False,
    tail: bool = True,
    tile: Tile | None = None,
    num_parts: int | None = None,
) -> Tensor:
    """Multiplies each row by its expert's weight; see `ops/grouped_mm_quantized/op.py`.

    Args:
        x: `[N, D]`, or `[N, F]` if transposed; contiguous.
        values: `[E, F, D]`, or packed; contiguous, like `scales` and `zeros`.
        scales: Scales of the groups.
        zeros: Zero points of the groups, or None.
        expert_offsets: `[E + 1]`.
        bias: `[E, F]`, or `[E, D]` if transposed, or None.
        transposed: Whether to multiply by the transposed weight.
        tail: Whether rows of no expert are written as zeros.
        tile: Overrides `quantized_launch.choose`.
        num_parts: Overrides `quantized_launch.num_parts`.
    """
    weight = stored(values, scales, zeros, transposed)
    num_rows = x.shape[0]
    y = x.new_empty(num_rows, weight.width if transposed else weight.rows)
    if y.numel() == 0:
        return y
    offsets = expert_offsets.contiguous()
    bias = None if bias is None else bias.contiguous()
    place, layout = place_of(x), layout_of(x)
    launch, source, parts = _product(
        place,
        num_rows,
        layout,
        weight,
        0,
        bias is not None,
        tail,
        precision(x.dtype),
        tile,
        num_parts,
    )
    operands = (source.of(x), values, scales, zeros)
    if parts == 1:
        launch(*operands, bias, y, offsets, None)
        return y
    partial = _workspace(x, parts, *y.shape)
    launch(*operands, None, partial, offsets, None)
    sizes = (num_rows, parts, weight.experts, y.shape[1])
    _add(place, sizes, bias is not None, x.dtype)(partial, bias, y, offsets)
    return y


def partial_products(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    offsets: Tensor,
    row_order: Tensor,
    top_k: int,
    num_parts: int,
    tile: Tile | None = None,
) -> Tensor:
    """Returns the partial sums `[P, N, F]` of gathered rows; rows of no expert are not written.

    Args:
        x: `[T, D]`, contiguous.
        values: `[E, F, D]`, or packed; contiguous, like `scales` and `zeros`.
        scales: Scales of the groups.
        zeros: Zero points of the groups, or None.
        offsets: `[E + 1]`.
        row_order: `[N]`. Row i is read from `x[row_order[i] // top_k]`.
        top_k: K.
        num_parts: P.
        tile: Overrides `quantized_launch.choose`.
    """
    weight = stored(values, scales, zeros)
    (num_rows,) = row_order.shape
    launch, source, _ = _product(
        place_of(x),
        num_rows,
        layout_of(x),
        weight,
        top_k,
        False,
        False,
        precision(x.dtype),
        tile,
        num_parts,
    )
    partial = _workspace(x, num_parts, num_rows, weight.rows)
    if partial.numel():
        launch(source.of(x), values, scales, zeros, None, partial, offsets, row_order)
    return partial


def _workspace(x: Tensor, *sizes: int) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(sizes, dtype=dtype)


@planned
def _product(
    place: Place,
    num_rows: int,
    x: Layout,
    weight: Stored,
    top_k: int,
    has_bias: bool,
    tail: bool,
    precision: str,
    tile: Tile | None,
    num_parts: int | None,
) -> tuple[Launch, Source, int]:
    sizes = (weight.rows, weight.width)
    inner, width = sizes if weight.transposed else reversed(sizes)
    rows, tf32 = rows_bucket(num_rows, weight.experts), precision == "tf32"
    problem = Problem("rows", inner, width, 0, weight.experts, max(1, top_k), x.dtype, rows, tf32)
    tile = tile or quantized_launch.choose(problem, weight, place.gpu)
    parts = num_parts or quantized_launch.num_parts(problem, tile, num_rows, place.gpu)
    num_tiles = (num_rows // tile.block_m + weight.experts + 1) * triton.cdiv(width, tile.block_n)
    source = rows_source(x, tile, top_k)
    launch = Launch(
        place,
        grouped_mm_quantized_kernel,
        (quantized_launch.num_programs(problem, weight, tile, parts * num_tiles, place.gpu),),
        (
            num_rows,
            parts,
            weight.experts,
            inner,
            width,
            weight.rows,
            quantized_launch.part_length(inner, tile, parts),
        ),
        {
            "X_FORM": source.form,
            "TOP_K": top_k,
            "HAS_BIAS": has_bias and parts == 1,
            "TAIL": tail and parts == 1,
            **quantized_launch.constants(problem, weight, tile),
        },
    )
    return launch, source, parts


@planned
def _add(place: Place, sizes: tuple[int, ...], has_bias: bool, dtype: torch.dtype) -> Launch:
    num_rows, _, num_experts, width = sizes
    return Launch(
        place,
        add_parts_kernel,
        quantized_launch.adding_grid(num_rows, width),
        sizes,
        {
            "HAS_BIAS": has_bias,
            **quantized_launch.adding_constants(num_experts, dtype),
        },
    )
