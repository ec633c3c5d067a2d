"""Triton kernel of the first matmul of the fused `moe_mlp`.

The kernel gathers tokens as it reads them and applies the activation to its sums in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from unimoe_kernels._triton.activation import activate, gate_constants
from unimoe_kernels._triton.descriptors import Source, weight_source
from unimoe_kernels._triton.halves import store_halves
from unimoe_kernels._triton.launch import precision
from unimoe_kernels._triton.matmul import multiply_rows
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


@triton.jit(do_not_specialize=["num_rows"])
def gated_kernel(
    x_ptr,
    weight_source,
    bias_ptr,
    hidden_ptr,
    out_ptr,
    offsets_ptr,
    row_order_ptr,
    num_rows,
    num_experts,
    inner,
    width,
    stride_weight_e,
    stride_weight_n,
    stride_weight_k,
    stride_weight_up,
    WEIGHT_FORM: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP_HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
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
    """Writes `act(W1 x + b1)` of the gathered rows and, with `KEEP_HIDDEN`, the pre-activations.

    Pre-activations are zero for rows of no expert, so that a saved tensor has no uninitialised
    memory.
    """
    ends_E, tiles_E = count_row_tiles(
        offsets_ptr, num_rows, num_experts, BLOCK_E, BLOCK_M, KEEP_HIDDEN
    )
    num_tiles_m = tl.max(ends_E, axis=0)
    num_tiles_n = tl.cdiv(width, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), num_tiles_m * num_tiles_n, tl.num_programs(0)):
        tile_m, tile_n = locate_tile(tile, num_tiles_m, num_tiles_n, GROUP_M)
        expert, start_m, end_m = locate_rows(
            tile_m, ends_E, tiles_E, offsets_ptr, num_rows, num_experts, BLOCK_E, BLOCK_M
        )
        owned = expert < num_experts
        offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < width
        gate_MN, up_MN = multiply_rows(
            x_ptr,
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
            stride_weight_up,
            "pointers",
            WEIGHT_FORM,
            TOP_K,
            True,
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


def gated(
    x: Tensor,
    weight: Tensor,
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
        weight: `[E, 2F, D]`, any strides.
        bias: `[E, 2F]` or None.
        offsets: `[E + 1]`.
        row_order: `[N]`.
        top_k: K.
        gate: Activation, limit and alpha.
        keep_hidden: Whether pre-activations `[N, 2F]` are returned; otherwise `[0, 2F]`.
        tile: Tile to use instead of the one that `choose` returns.
    """
    num_rows, double_width = row_order.shape[0], weight.shape[1]
    out = x.new_empty(num_rows, double_width // 2)
    hidden = x.new_empty(num_rows if keep_hidden else 0, double_width)
    if out.numel() == 0:
        return out, hidden
    launch, source = _gated(
        place_of(x),
        num_rows,
        layout_of(weight),
        top_k,
        bias is not None,
        keep_hidden,
        gate,
        precision(x.dtype),
        tile,
    )
    bias = None if bias is None else bias.contiguous()
    launch(x, source.of(weight), bias, hidden, out, offsets, row_order)
    return out, hidden


@planned
def _gated(
    place: Place,
    num_rows: int,
    weight: Layout,
    top_k: int,
    has_bias: bool,
    keep_hidden: bool,
    gate: tuple[str, float, float],
    precision: str,
    tile: Tile | None,
) -> tuple[Launch, Source]:
    num_experts, double_width, inner = weight.shape
    width, dtype = double_width // 2, weight.dtype
    rows, tf32 = rows_bucket(num_rows, num_experts), precision == "tf32"
    problem = Problem("gated", inner, width, 0, num_experts, top_k, dtype, rows, tf32)
    tile = tile or choose(problem, place.gpu)
    num_tiles = (num_rows // tile.block_m + num_experts + 1) * triton.cdiv(width, tile.block_n)
    source = weight_source(weight, tile)
    launch = Launch(
        place,
        gated_kernel,
        (num_programs(problem, tile, num_tiles, place.gpu),),
        (num_rows, num_experts, inner, width, *weight.strides, width * weight.strides[1]),
        {
            "WEIGHT_FORM": source.form,
            "TOP_K": top_k,
            "HAS_BIAS": has_bias,
            "KEEP_HIDDEN": keep_hidden,
            **gate_constants(gate),
            **product_constants(problem, tile),
        },
    )
    return launch, source
