"""Triton kernels of `grouped_mm`, its weight gradient and its bias gradient.

Grids are persistent, and tiles come from the offsets of the experts on the device. Either operand
that has a row for each routed row can be read through `row_order` from a row for each token
(`TOP_K > 0`), so that a fused layer needs no permuted copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unimoe_kernels._triton.descriptors import describe_owned, describe_rows, describe_weight
from unimoe_kernels._triton.launch import accumulator, device_of, matmul_constants, precision
from unimoe_kernels._triton.loads import (
    advance,
    place_rows,
    place_weight,
    read_owned,
    read_rows,
    read_weight,
    source_rows,
)
from unimoe_kernels._triton.schedule import count_row_tiles, locate_rows, locate_tile
from unimoe_kernels._triton.tiles import Problem, Tile, choose, num_programs, rows_bucket

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
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes `y[i] = weight[e] @ x[i] + bias[e]`; with `TAIL` zeros for rows of no expert."""
    ends, tiles = count_row_tiles(offsets_ptr, num_rows, num_experts, EXPERTS, BLOCK_M, TAIL)
    num_row_tiles = tl.max(ends, axis=0)
    num_column_tiles = tl.cdiv(width, BLOCK_N)
    step = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), num_row_tiles * num_column_tiles, tl.num_programs(0)):
        row_tile, column_tile = locate_tile(tile, num_row_tiles, num_column_tiles, GROUP_M)
        expert, first_row, end_row = locate_rows(
            row_tile, ends, tiles, offsets_ptr, num_rows, num_experts, EXPERTS, BLOCK_M
        )
        column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = column < width
        x_place = place_rows(
            x_source, first_row, end_row, step, inner, row_order_ptr, TOP_K, BLOCK_M, X_FORM
        )
        weight_place = place_weight(
            weight_source,
            expert,
            column,
            step,
            stride_weight_e,
            stride_weight_n,
            stride_weight_k,
            WEIGHT_FORM,
        )
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
        # Nothing is read for rows of no expert.
        for k in range(0, tl.where(expert < num_experts, inner, 0), BLOCK_K):
            known = step < inner - k
            x = read_rows(x_source, x_place, k, known, EVEN_K, X_FORM)
            weight = read_weight(
                weight_source,
                weight_place,
                column_tile * BLOCK_N,
                k,
                known,
                inside,
                EVEN_K,
                EVEN_N,
                WEIGHT_FORM,
            )
            if UPCAST:
                x, weight = x.to(ACC), weight.to(ACC)
            total = tl.dot(x, weight, total, input_precision=PRECISION, out_dtype=ACC)
            x_place = advance(x_place, BLOCK_K, X_FORM)
            weight_place = advance(weight_place, BLOCK_K * stride_weight_k, WEIGHT_FORM)
        if HAS_BIAS:
            wanted = column < tl.where(expert < num_experts, width, 0)
            bias = tl.load(bias_ptr + expert.to(tl.int64) * width + column, mask=wanted, other=0)
            total += bias.to(ACC)[None, :]
        row = first_row + tl.arange(0, BLOCK_M)
        y_ptrs = y_ptr + row.to(tl.int64)[:, None] * width + column[None, :]
        mask = (row < end_row)[:, None] & inside[None, :]
        tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def grouped_mm_wgrad_kernel(
    grad_source,
    x_source,
    grad_weight_ptr,
    offsets_ptr,
    row_order_ptr,
    num_experts,
    height,
    width,
    GRAD_FORM: tl.constexpr,
    X_FORM: tl.constexpr,
    GRAD_TOP_K: tl.constexpr,
    X_TOP_K: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes `grad_weight[e] = grad.T @ x` over the rows of expert e: zeros where it has none."""
    num_row_tiles, num_column_tiles = tl.cdiv(height, BLOCK_M), tl.cdiv(width, BLOCK_N)
    tiles_of_expert = num_row_tiles * num_column_tiles
    for tile in range(tl.program_id(0), num_experts * tiles_of_expert, tl.num_programs(0)):
        expert = tile // tiles_of_expert
        row_tile, column_tile = locate_tile(
            tile % tiles_of_expert, num_row_tiles, num_column_tiles, GROUP_M
        )
        begin, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
        for first in range(begin, end, BLOCK_K):
            grad = read_owned(
                grad_source,
                begin,
                end,
                first,
                row_tile * BLOCK_M,
                row_order_ptr,
                height,
                GRAD_TOP_K,
                EVEN,
                BLOCK_K,
                BLOCK_M,
                GRAD_FORM,
            ).T
            x = read_owned(
                x_source,
                begin,
                end,
                first,
                column_tile * BLOCK_N,
                row_order_ptr,
                width,
                X_TOP_K,
                EVEN,
                BLOCK_K,
                BLOCK_N,
                X_FORM,
            )
            if UPCAST:
                grad, x = grad.to(ACC), x.to(ACC)
            total = tl.dot(grad, x, total, input_precision=PRECISION, out_dtype=ACC)
        out_row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        out_ptrs = grad_weight_ptr + expert.to(tl.int64) * height * width
        out_ptrs += out_row.to(tl.int64)[:, None] * width + column[None, :]
        mask = (out_row < height)[:, None] & (column < width)[None, :]
        tl.store(out_ptrs, total.to(grad_weight_ptr.dtype.element_ty), mask=mask)


@triton.jit
def grouped_sum_kernel(
    grad_ptr,
    scores_ptr,
    sum_ptr,
    offsets_ptr,
    row_order_ptr,
    width,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sums the rows of an expert, those gathered by token (`TOP_K > 0`) times their scores."""
    expert = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < width
    begin, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    total = tl.zeros((BLOCK_K, BLOCK_N), dtype=ACC)
    for first in range(begin, end, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        owned = row < end
        source = source_rows(tl.minimum(row, end - 1), row_order_ptr, TOP_K)
        mask = owned[:, None] & inside[None, :]
        grad = tl.load(grad_ptr + source[:, None] * width + column[None, :], mask=mask, other=0)
        grad = grad.to(ACC)
        if TOP_K > 0:
            routed = tl.load(row_order_ptr + row, mask=owned, other=0)
            score = tl.load(scores_ptr + routed, mask=owned, other=0)
            grad *= score.to(ACC)[:, None]
        total += grad
    result = tl.sum(total, axis=0).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + expert.to(tl.int64) * width + column, result, mask=inside)


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
        row_order: `[N]` or None. With it row i is read at `x[row_order[i] // top_k]`.
        top_k: K, with `row_order`.
        tail: Whether rows of no expert are written, as zeros.
        tile: Taken instead of the one that `choose` returns.
    """
    num_experts, width, inner = weight.shape
    num_rows = (x if row_order is None else row_order).shape[0]
    y = x.new_empty(num_rows, width)
    if y.numel() == 0:
        return y
    device = device_of(x)
    expert_offsets = expert_offsets.contiguous()
    rows = rows_bucket(num_rows, num_experts)
    tf32 = precision(x.dtype) == "tf32"
    problem = Problem("rows", inner, width, 0, num_experts, max(1, top_k), x.dtype, rows, tf32)
    tile = tile or choose(problem, device)
    num_tiles = (num_rows // tile.block_m + num_experts + 1) * triton.cdiv(width, tile.block_n)
    top_k = 0 if row_order is None else top_k
    x_source, x_form = describe_rows(x, tile, top_k)
    weight_source, weight_form = describe_weight(weight, tile)
    with torch.cuda.device_of(x):
        grouped_mm_kernel[(num_programs(problem, tile, num_tiles, device),)](
            x_source,
            weight_source,
            None if bias is None else bias.contiguous(),
            y,
            expert_offsets,
            row_order,
            num_rows,
            num_experts,
            inner,
            width,
            *weight.stride(),
            X_FORM=x_form,
            WEIGHT_FORM=weight_form,
            TOP_K=top_k,
            HAS_BIAS=bias is not None,
            TAIL=tail,
            EVEN_N=width % tile.block_n == 0,
            EVEN_K=inner % tile.block_k == 0,
            EXPERTS=triton.next_power_of_2(num_experts + 1),
            **tile.constants(),
            **matmul_constants(x.dtype),
        )
    return y


def grouped_mm_wgrad(
    grad: Tensor,
    x: Tensor,
    expert_offsets: Tensor,
    has_bias: bool,
    row_order: Tensor | None = None,
    grad_top_k: int = 0,
    x_top_k: int = 0,
    scores: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns `grad.T @ x` and, with `has_bias`, the sum of `grad`, for each expert.

    Args:
        grad: `[N, F]`, contiguous; with `grad_top_k` `[T, F]`, read through `row_order`.
        x: `[N, D]`, contiguous; with `x_top_k` `[T, D]`, read through `row_order`.
        expert_offsets: `[E + 1]`.
        has_bias: Whether the sum is wanted.
        row_order: `[N]`, if any operand is read through it.
        grad_top_k: K or 0.
        x_top_k: K or 0.
        scores: `[T, K]`, with `grad_top_k` and `has_bias`: weights of the rows in the sum.
        tile: Taken instead of the one that `choose` returns.
    """
    num_experts, height, width = expert_offsets.shape[0] - 1, grad.shape[1], x.shape[1]
    num_rows = (grad if row_order is None else row_order).shape[0]
    expert_offsets = expert_offsets.contiguous()
    grad_weight = x.new_empty(num_experts, height, width)
    grad_bias = x.new_empty(num_experts if has_bias else 0, height)
    with torch.cuda.device_of(x):
        if grad_weight.numel():
            device = device_of(x)
            rows = rows_bucket(num_rows, num_experts)
            top_k, tf32 = max(1, grad_top_k, x_top_k), precision(x.dtype) == "tf32"
            problem = Problem("weights", 0, width, height, num_experts, top_k, x.dtype, rows, tf32)
            tile = tile or choose(problem, device)
            num_tiles = triton.cdiv(height, tile.block_m) * triton.cdiv(width, tile.block_n)
            grid = (num_programs(problem, tile, num_tiles * num_experts, device),)
            grad_source, grad_form = describe_owned(grad, tile, tile.block_m, grad_top_k)
            x_source, x_form = describe_owned(x, tile, tile.block_n, x_top_k)
            grouped_mm_wgrad_kernel[grid](
                grad_source,
                x_source,
                grad_weight,
                expert_offsets,
                row_order,
                num_experts,
                height,
                width,
                GRAD_FORM=grad_form,
                X_FORM=x_form,
                GRAD_TOP_K=grad_top_k,
                X_TOP_K=x_top_k,
                EVEN=height % tile.block_m == 0 and width % tile.block_n == 0,
                **tile.constants(),
                **matmul_constants(x.dtype),
            )
        if grad_bias.numel():
            grid = (num_experts, triton.cdiv(height, BIAS_BLOCK_COLUMNS))
            grouped_sum_kernel[grid](
                grad,
                scores,
                grad_bias,
                expert_offsets,
                row_order,
                height,
                TOP_K=grad_top_k,
                BLOCK_K=BIAS_BLOCK_ROWS,
                BLOCK_N=BIAS_BLOCK_COLUMNS,
                ACC=accumulator(x.dtype),
            )
    return grad_weight, grad_bias
