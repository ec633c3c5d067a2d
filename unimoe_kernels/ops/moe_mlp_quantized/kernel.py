"""Triton kernels of the first matmul of the fused `moe_mlp_quantized`.

Tokens are gathered as they are read. The activation is applied to the sums in registers or, where
the sums are split into parts, when the parts are added.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unimoe_kernels._triton import quantized_launch
from unimoe_kernels._triton.activation import activate, gate_constants
from unimoe_kernels._triton.halves import store_halves
from unimoe_kernels._triton.launch import precision
from unimoe_kernels._triton.planned import Launch, Place, place_of, planned
from unimoe_kernels._triton.problem import Problem, Tile
from unimoe_kernels._triton.quantized import expert_of_rows, multiply_quantized_rows
from unimoe_kernels._triton.quantized_launch import Stored, stored
from unimoe_kernels._triton.schedule import count_row_tiles, locate_rows, locate_tile
from unimoe_kernels._triton.tiles import rows_bucket


@triton.jit(do_not_specialize=["num_rows"])
def gated_quantized_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    hidden_ptr,
    out_ptr,
    offsets_ptr,
    row_order_ptr,
    num_rows,
    num_experts,
    inner,
    width,
    stored_rows,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP_HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
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
    """Writes `act(W1 x + b1)` of gathered rows, and with `KEEP_HIDDEN` also the pre-activations.

    Pre-activations of rows of no expert are zero, so that the saved tensor has no uninitialised
    values.
    """
    ends_E, tiles_E = count_row_tiles(
        offsets_ptr, num_rows, num_experts, BLOCK_E, BLOCK_M, KEEP_HIDDEN
    )
    num_tiles_m = tl.max(ends_E, axis=0)
    num_tiles_n = tl.cdiv(width, BLOCK_N)
    for tile in range(tl.program_id(0), num_tiles_m * num_tiles_n, tl.num_programs(0)):
        tile_m, tile_n = locate_tile(tile, num_tiles_m, num_tiles_n, GROUP_M)
        expert, start_m, end_m = locate_rows(
            tile_m, ends_E, tiles_E, offsets_ptr, num_rows, num_experts, BLOCK_E, BLOCK_M
        )
        owned = expert < num_experts
        gate_MN, up_MN = multiply_quantized_rows(
            x_ptr,
            values_ptr,
            scales_ptr,
            zeros_ptr,
            row_order_ptr,
            expert,
            start_m,
            end_m,
            tile_n * BLOCK_N,
            0,
            inner,
            num_experts,
            inner,
            width,
            width,
            stored_rows,
            "pointers",
            TOP_K,
            TRANSPOSED,
            FOUR_BITS,
            HAS_ZEROS,
            GROUP,
            SCALES,
            True,
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
        mask_n = offs_n < width
        if HAS_BIAS:
            bias_ptrs = bias_ptr + expert.to(tl.int64) * (2 * width) + offs_n
            bias_mask_n = offs_n < tl.where(owned, width, 0)
            gate_MN += tl.load(bias_ptrs, mask=bias_mask_n, other=0).to(ACC)[None, :]
            up_MN += tl.load(bias_ptrs + width, mask=bias_mask_n, other=0).to(ACC)[None, :]
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_mn = (offs_m < end_m)[:, None] & mask_n[None, :]
        out_mask_mn = (offs_m < tl.where(owned, end_m, 0))[:, None] & mask_n[None, :]
        offs_m = offs_m.to(tl.int64)
        if KEEP_HIDDEN:
            store_halves(hidden_ptr, gate_MN, up_MN, offs_m, offs_n, width, mask_mn)
        out_MN = activate(gate_MN, up_MN, ACTIVATION, LIMIT, ALPHA)
        out_ptrs = out_ptr + offs_m[:, None] * width + offs_n[None, :]
        tl.store(out_ptrs, out_MN.to(out_ptr.dtype.element_ty), mask=out_mask_mn)


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def activate_parts_kernel(
    parts_ptr,
    bias_ptr,
    hidden_ptr,
    out_ptr,
    offsets_ptr,
    num_rows,
    num_parts,
    num_experts,
    width,
    HAS_BIAS: tl.constexpr,
    KEEP_HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    """Adds the partial sums of gate and up in order. Same outputs as `gated_quantized_kernel`."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < width
    owned_m = offs_m < tl.load(offsets_ptr + num_experts)
    owned_mn = owned_m[:, None] & mask_n[None, :]
    offs_mn = offs_m.to(tl.int64)[:, None] * (2 * width) + offs_n[None, :]
    gate_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    up_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    parts_ptrs = parts_ptr + offs_mn
    for _ in range(0, num_parts):
        gate_MN += tl.load(parts_ptrs, mask=owned_mn, other=0)
        up_MN += tl.load(parts_ptrs + width, mask=owned_mn, other=0)
        parts_ptrs += tl.cast(num_rows, tl.int64) * (2 * width)
    if HAS_BIAS:
        expert_M = expert_of_rows(offsets_ptr, offs_m, num_experts, BLOCK_E)
        bias_ptrs = bias_ptr + expert_M[:, None] * (2 * width) + offs_n[None, :]
        gate_MN += tl.load(bias_ptrs, mask=owned_mn, other=0).to(ACC)
        up_MN += tl.load(bias_ptrs + width, mask=owned_mn, other=0).to(ACC)
    offs_m = offs_m.to(tl.int64)
    if KEEP_HIDDEN:
        mask_mn = (offs_m < num_rows)[:, None] & mask_n[None, :]
        store_halves(hidden_ptr, gate_MN, up_MN, offs_m, offs_n, width, mask_mn)
    out_MN = activate(gate_MN, up_MN, ACTIVATION, LIMIT, ALPHA)
    out_ptrs = out_ptr + offs_m[:, None] * width + offs_n[None, :]
    tl.store(out_ptrs, out_MN.to(out_ptr.dtype.element_ty), mask=owned_mn)


def num_parts(x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None, rows: int) -> int:
    """Returns the number of parts into which the sums of `rows` routed rows are split."""
    weight = stored(values, scales, zeros)
    return _plan_parts(place_of(x), weight, rows, x.dtype, precision(x.dtype))


def gated(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    offsets: Tensor,
    row_order: Tensor,
    top_k: int,
    gate: tuple[str, float, float],
    keep_hidden: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the activations `[N, F]` of tokens in expert order, and the pre-activations.

    Args:
        x: `[T, D]`, contiguous.
        values: `[E, 2F, D]`, or packed; contiguous, like `scales` and `zeros`.
        scales: Scales of the groups.
        zeros: Zero points of the groups, or None.
        bias: `[E, 2F]` or None.
        offsets: `[E + 1]`.
        row_order: `[N]`.
        top_k: K.
        gate: Activation, limit and alpha.
        keep_hidden: Whether to write the pre-activations `[N, 2F]`; if not, `[0, 2F]` is returned.
        tile: Overrides `quantized_launch.choose`.
    """
    (num_rows,), weight = row_order.shape, stored(values, scales, zeros)
    out, hidden = _outputs(x, num_rows, weight.rows, keep_hidden)
    if out.numel() == 0:
        return out, hidden
    launch = _gated(
        place_of(x),
        num_rows,
        weight,
        top_k,
        bias is not None,
        keep_hidden,
        gate,
        x.dtype,
        precision(x.dtype),
        tile,
    )
    bias = None if bias is None else bias.contiguous()
    launch(x, values, scales, zeros, bias, hidden, out, offsets, row_order)
    return out, hidden


def activate_parts(
    x: Tensor,
    parts: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    gate: tuple[str, float, float],
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the outputs of `gated` from its partial sums `[P, N, 2F]`, in the dtype of `x`."""
    count, num_rows, double_width = parts.shape
    out, hidden = _outputs(x, num_rows, double_width, keep_hidden)
    if out.numel():
        sizes = (num_rows, count, offsets.shape[0] - 1, double_width // 2)
        launch = _activate(place_of(x), sizes, bias is not None, keep_hidden, gate, x.dtype)
        bias = None if bias is None else bias.contiguous()
        launch(parts, bias, hidden, out, offsets)
    return out, hidden


def _outputs(
    x: Tensor, num_rows: int, double_width: int, keep_hidden: bool
) -> tuple[Tensor, Tensor]:
    hidden = x.new_empty(num_rows if keep_hidden else 0, double_width)
    return x.new_empty(num_rows, double_width // 2), hidden


def _problem(
    weight: Stored, num_rows: int, top_k: int, dtype: torch.dtype, precision: str
) -> Problem:
    width, rows = weight.rows // 2, rows_bucket(num_rows, weight.experts)
    tf32 = precision == "tf32"
    return Problem("gated", weight.width, width, 0, weight.experts, top_k, dtype, rows, tf32)


@planned
def _plan_parts(
    place: Place, weight: Stored, num_rows: int, dtype: torch.dtype, precision: str
) -> int:
    problem = _problem(weight, num_rows, 1, dtype, precision)
    tile = quantized_launch.choose(problem, weight, place.gpu)
    return quantized_launch.num_parts(problem, tile, num_rows, place.gpu)


@planned
def _gated(
    place: Place,
    num_rows: int,
    weight: Stored,
    top_k: int,
    has_bias: bool,
    keep_hidden: bool,
    gate: tuple[str, float, float],
    dtype: torch.dtype,
    precision: str,
    tile: Tile | None,
) -> Launch:
    problem = _problem(weight, num_rows, top_k, dtype, precision)
    tile = tile or quantized_launch.choose(problem, weight, place.gpu)
    num_tiles = num_rows // tile.block_m + weight.experts + 1
    num_tiles *= triton.cdiv(problem.width, tile.block_n)
    return Launch(
        place,
        gated_quantized_kernel,
        (quantized_launch.num_programs(problem, weight, tile, num_tiles, place.gpu),),
        (num_rows, weight.experts, weight.width, problem.width, weight.rows),
        {
            "TOP_K": top_k,
            "HAS_BIAS": has_bias,
            "KEEP_HIDDEN": keep_hidden,
            **gate_constants(gate),
            **quantized_launch.constants(problem, weight, tile),
        },
    )


@planned
def _activate(
    place: Place,
    sizes: tuple[int, ...],
    has_bias: bool,
    keep_hidden: bool,
    gate: tuple[str, float, float],
    dtype: torch.dtype,
) -> Launch:
    num_rows, _, num_experts, width = sizes
    return Launch(
        place,
        activate_parts_kernel,
        quantized_launch.adding_grid(num_rows, width),
        sizes,
        {
            "HAS_BIAS": has_bias,
            "KEEP_HIDDEN": keep_hidden,
            **gate_constants(gate),
            **quantized_launch.adding_constants(num_experts, dtype),
        },
    )
