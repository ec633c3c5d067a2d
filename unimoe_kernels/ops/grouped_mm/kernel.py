"""Triton kernels of `grouped_mm`, its weight gradient and its bias gradient.

Grids are persistent, and tiles are computed from the expert offsets on the device. With `TOP_K > 0`
rows are gathered from tokens through `row_order`, so a fused layer needs no permuted copy. Weight
gradients read rows in expert order: on an H100, reading them through tensor descriptors is 15 to
28 % faster than a gather, which requires pointers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unimoe_kernels._triton.descriptors import Source, owned_source, rows_source, weight_source
from unimoe_kernels._triton.launch import accumulator, matmul_constants, precision
from unimoe_kernels._triton.loads import read_owned
from unimoe_kernels._triton.matmul import add_product, multiply_rows
from unimoe_kernels._triton.planned import Launch, Layout, Place, layout_of, place_of, planned
from unimoe_kernels._triton.schedule import count_row_tiles, locate_rows, locate_tile
from unimoe_kernels._triton.tiles import (
    Problem,
    Tile,
    choose,
    num_programs,
    product_constants,
    rows_bucket,
)

BIAS_BLOCK_ROWS = 16
BIAS_BLOCK_COLUMNS = 64


@triton.jit(do_not_specialize=["num_rows"])
def grouped_mm_kernel(
    x_source,
    weight_source,
    bias_ptr,
    y_ptr,
    offsets_ptr,
    row_order_ptr,
    num_rows,
    num_experts,
    inner,
    width,
    stride_weight_e,
    stride_weight_n,
    stride_weight_k,
    X_FORM: tl.constexpr,
    WEIGHT_FORM: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TAIL: tl.constexpr,
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
    """Writes `y[i] = weight[e] @ x[i] + bias[e]` and, with `TAIL`, zeros for rows of no expert."""
    ends_E, tiles_E = count_row_tiles(offsets_ptr, num_rows, num_experts, BLOCK_E, BLOCK_M, TAIL)
    num_tiles_m = tl.max(ends_E, axis=0)
    num_tiles_n = tl.cdiv(width, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), num_tiles_m * num_tiles_n, tl.num_programs(0)):
        tile_m, tile_n = locate_tile(tile, num_tiles_m, num_tiles_n, GROUP_M)
        expert, start_m, end_m = locate_rows(
            tile_m, ends_E, tiles_E, offsets_ptr, num_rows, num_experts, BLOCK_E, BLOCK_M
        )
        offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < width
        acc_MN, _ = multiply_rows(
            x_source,
            weight_source,
            row_order_ptr,
            expert,
            start_m,
            end_m,
            tile_n * BLOCK_N,
            offs_n,
            mask_n,
            offs_k,
            num_experts,
            inner,
            width,
            stride_weight_e,
            stride_weight_n,
            stride_weight_k,
            0,
            X_FORM,
            WEIGHT_FORM,
            TOP_K,
            True,
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
        if HAS_BIAS:
            bias_mask_n = offs_n < tl.where(expert < num_experts, width, 0)
            bias_N = tl.load(
                bias_ptr + expert.to(tl.int64) * width + offs_n, mask=bias_mask_n, other=0
            )
            acc_MN += bias_N.to(ACC)[None, :]
        offs_m = start_m + tl.arange(0, BLOCK_M)
        y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * width + offs_n[None, :]
        mask_mn = (offs_m < end_m)[:, None] & mask_n[None, :]
        tl.store(y_ptrs, acc_MN.to(y_ptr.dtype.element_ty), mask=mask_mn)


@triton.jit
def grouped_mm_wgrad_kernel(
    grad_source,
    x_source,
    grad_weight_ptr,
    offsets_ptr,
    num_experts,
    height,
    width,
    GRAD_FORM: tl.constexpr,
    X_FORM: tl.constexpr,
    EVEN_MN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes `grad_weight[e] = grad.T @ x` over the rows of expert e; zeros if it has none."""
    num_tiles_m, num_tiles_n = tl.cdiv(height, BLOCK_M), tl.cdiv(width, BLOCK_N)
    tiles_of_expert = num_tiles_m * num_tiles_n
    for tile in range(tl.program_id(0), num_experts * tiles_of_expert, tl.num_programs(0)):
        expert = tile // tiles_of_expert
        tile_m, tile_n = locate_tile(tile % tiles_of_expert, num_tiles_m, num_tiles_n, GROUP_M)
        begin_k, end_k = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
        acc_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
        for start_k in range(begin_k, end_k, BLOCK_K):
            grad_MK = read_owned(
                grad_source,
                begin_k,
                end_k,
                start_k,
                tile_m * BLOCK_M,
                height,
                EVEN_MN,
                BLOCK_K,
                BLOCK_M,
                GRAD_FORM,
            ).T
            x_KN = read_owned(
                x_source,
                begin_k,
                end_k,
                start_k,
                tile_n * BLOCK_N,
                width,
                EVEN_MN,
                BLOCK_K,
                BLOCK_N,
                X_FORM,
            )
            acc_MN = add_product(grad_MK, x_KN, acc_MN, PRECISION, UPCAST)
        offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        grad_weight_ptrs = grad_weight_ptr + expert.to(tl.int64) * height * width
        grad_weight_ptrs += offs_m.to(tl.int64)[:, None] * width + offs_n[None, :]
        mask_mn = (offs_m < height)[:, None] & (offs_n < width)[None, :]
        tl.store(grad_weight_ptrs, acc_MN.to(grad_weight_ptr.dtype.element_ty), mask=mask_mn)


@triton.jit
def grouped_sum_kernel(
    grad_ptr,
    scores_ptr,
    sum_ptr,
    offsets_ptr,
    row_order_ptr,
    width,
    HAS_SCORES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sums the rows of an expert, weighted by scores with `HAS_SCORES`."""
    expert = tl.program_id(0)
    pid_n = tl.program_id(1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < width
    begin_k, end_k = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    acc_KN = tl.zeros((BLOCK_K, BLOCK_N), dtype=ACC)
    for start_k in range(begin_k, end_k, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < end_k
        grad_KN = read_owned(
            grad_ptr,
            begin_k,
            end_k,
            start_k,
            pid_n * BLOCK_N,
            width,
            False,
            BLOCK_K,
            BLOCK_N,
            "pointers",
        ).to(ACC)
        if HAS_SCORES:
            routed_K = tl.load(row_order_ptr + offs_k, mask=mask_k, other=0)
            score_K = tl.load(scores_ptr + routed_K, mask=mask_k, other=0)
            grad_KN *= score_K.to(ACC)[:, None]
        acc_KN += grad_KN
    sum_N = tl.sum(acc_KN, axis=0).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + expert.to(tl.int64) * width + offs_n, sum_N, mask=mask_n)


def grouped_mm(
    x: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None,
    row_order: Tensor | None = None,
    top_k: int = 0,
    tail: bool = True,
    tile: Tile | None = None,
) -> Tensor:
    """Multiplies rows of contiguous `x`; see `ops/grouped_mm/op.py`.

    Args:
        x: `[N, D]`, or with `row_order` `[T, D]`.
        weight: `[E, F, D]`, any strides.
        expert_offsets: `[E + 1]`.
        bias: `[E, F]` or None.
        row_order: `[N]` or None. If given, row i is read from `x[row_order[i] // top_k]`.
        top_k: K; required with `row_order`.
        tail: Whether zeros are written for rows of no expert.
        tile: Tile to use instead of the one that `choose` returns.
    """
    num_rows = (x if row_order is None else row_order).shape[0]
    y = x.new_empty(num_rows, weight.shape[1])
    if y.numel() == 0:
        return y
    launch, x_source, w_source = _product(
        place_of(x),
        num_rows,
        layout_of(x),
        layout_of(weight),
        0 if row_order is None else top_k,
        bias is not None,
        tail,
        precision(x.dtype),
        tile,
    )
    launch(
        x_source.of(x),
        w_source.of(weight),
        None if bias is None else bias.contiguous(),
        y,
        expert_offsets.contiguous(),
        row_order,
    )
    return y


@planned
def _product(
    place: Place,
    num_rows: int,
    x: Layout,
    weight: Layout,
    top_k: int,
    has_bias: bool,
    tail: bool,
    precision: str,
    tile: Tile | None,
) -> tuple[Launch, Source, Source]:
    num_experts, width, inner = weight.shape
    rows, tf32 = rows_bucket(num_rows, num_experts), precision == "tf32"
    problem = Problem("rows", inner, width, 0, num_experts, max(1, top_k), x.dtype, rows, tf32)
    tile = tile or choose(problem, place.gpu)
    num_tiles = (num_rows // tile.block_m + num_experts + 1) * triton.cdiv(width, tile.block_n)
    x_source, w_source = rows_source(x, tile, top_k), weight_source(weight, tile)
    launch = Launch(
        place,
        grouped_mm_kernel,
        (num_programs(problem, tile, num_tiles, place.gpu),),
        (num_rows, num_experts, inner, width, *weight.strides),
        {
            "X_FORM": x_source.form,
            "WEIGHT_FORM": w_source.form,
            "TOP_K": top_k,
            "HAS_BIAS": has_bias,
            "TAIL": tail,
            **product_constants(problem, tile),
        },
    )
    return launch, x_source, w_source


def grouped_mm_wgrad(
    grad: Tensor,
    x: Tensor,
    expert_offsets: Tensor,
    has_bias: bool,
    scores: Tensor | None = None,
    row_order: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns `grad.T @ x` and, with `has_bias`, the sum of `grad`, for each expert.

    Args:
        grad: `[N, F]`, contiguous.
        x: `[N, D]`, contiguous.
        expert_offsets: `[E + 1]`.
        has_bias: Whether the sum is required.
        scores: `[T, K]` or None, weights of the rows in the sum.
        row_order: `[N]`, the routed row at each position; required with `scores`.
        tile: Tile to use instead of the one that `choose` returns.
    """
    num_experts, height, width = expert_offsets.shape[0] - 1, grad.shape[1], x.shape[1]
    expert_offsets, place = expert_offsets.contiguous(), place_of(x)
    grad_weight = x.new_empty(num_experts, height, width)
    grad_bias = x.new_empty(num_experts if has_bias else 0, height)
    if grad_weight.numel():
        launch, grad_source, x_source = _weight_gradient(
            place, num_experts, layout_of(grad), layout_of(x), precision(x.dtype), tile
        )
        launch(grad_source.of(grad), x_source.of(x), grad_weight, expert_offsets)
    if grad_bias.numel():
        launch = _sum(place, num_experts, height, scores is not None, x.dtype)
        launch(grad, scores, grad_bias, expert_offsets, row_order)
    return grad_weight, grad_bias


@planned
def _weight_gradient(
    place: Place, num_experts: int, grad: Layout, x: Layout, precision: str, tile: Tile | None
) -> tuple[Launch, Source, Source]:
    (num_rows, height), width = grad.shape, x.shape[1]
    rows, tf32 = rows_bucket(num_rows, num_experts), precision == "tf32"
    problem = Problem("weights", 0, width, height, num_experts, 1, x.dtype, rows, tf32)
    tile = tile or choose(problem, place.gpu)
    num_tiles = triton.cdiv(height, tile.block_m) * triton.cdiv(width, tile.block_n)
    grad_source = owned_source(grad, tile, tile.block_m)
    x_source = owned_source(x, tile, tile.block_n)
    launch = Launch(
        place,
        grouped_mm_wgrad_kernel,
        (num_programs(problem, tile, num_tiles * num_experts, place.gpu),),
        (num_experts, height, width),
        {
            "GRAD_FORM": grad_source.form,
            "X_FORM": x_source.form,
            "EVEN_MN": height % tile.block_m == 0 and width % tile.block_n == 0,
            **tile.constants(),
            **matmul_constants(x.dtype),
        },
    )
    return launch, grad_source, x_source


@planned
def _sum(
    place: Place, num_experts: int, height: int, has_scores: bool, dtype: torch.dtype
) -> Launch:
    return Launch(
        place,
        grouped_sum_kernel,
        (num_experts, triton.cdiv(height, BIAS_BLOCK_COLUMNS)),
        (height,),
        {
            "HAS_SCORES": has_scores,
            "BLOCK_K": BIAS_BLOCK_ROWS,
            "BLOCK_N": BIAS_BLOCK_COLUMNS,
            "ACC": accumulator(dtype),
        },
    )
