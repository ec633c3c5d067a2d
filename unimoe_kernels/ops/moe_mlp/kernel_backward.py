"""Triton kernels of the backward of the fused `moe_mlp`.

They compute `dA' = dO W2` without storing it: the gradients of the scores and of the
pre-activations, and the weighted activations for the gradient of W2, are computed from registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unimoe_kernels._triton.activation import activate, activate_backward, gate_constants
from unimoe_kernels._triton.descriptors import Source, weight_source
from unimoe_kernels._triton.halves import load_halves, split_halves, store_halves
from unimoe_kernels._triton.launch import accumulator, precision
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

SCORE_BLOCK = 32  # rows whose score gradients one program sums
SCORE_BLOCK_K = 64


@triton.jit
def finish_gated_backward(
    grad_MN,
    score_M,
    offs_m,
    end_m,
    offs_n,
    width,
    hidden_ptr,
    grad_hidden_ptr,
    activated_ptr,
    NEEDS_SCORES: tl.constexpr,
    NEEDS_HIDDEN: tl.constexpr,
    NEEDS_ACTIVATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    ACC: tl.constexpr,
):
    """Writes the results of some columns of dA' and returns the sum of `dA' * A` over them."""
    mask_mn = (offs_m < end_m)[:, None] & (offs_n < width)[None, :]
    offs_m = offs_m.to(tl.int64)
    gate_MN, up_MN = load_halves(hidden_ptr, offs_m, offs_n, width, mask_mn, ACC)
    dtype = hidden_ptr.dtype.element_ty
    partial_M = tl.zeros(score_M.shape, dtype=ACC)
    if NEEDS_SCORES or NEEDS_ACTIVATED:
        activated_MN = activate(gate_MN, up_MN, ACTIVATION, LIMIT, ALPHA)
        if NEEDS_SCORES:
            partial_M = tl.sum(grad_MN * activated_MN, axis=1)
        if NEEDS_ACTIVATED:
            out_MN = (score_M[:, None] * activated_MN).to(dtype)
            tl.store(
                activated_ptr + offs_m[:, None] * width + offs_n[None, :], out_MN, mask=mask_mn
            )
    if NEEDS_HIDDEN:
        grad_gate_MN, grad_up_MN = activate_backward(
            score_M[:, None] * grad_MN, gate_MN, up_MN, ACTIVATION, LIMIT, ALPHA
        )
        store_halves(grad_hidden_ptr, grad_gate_MN, grad_up_MN, offs_m, offs_n, width, mask_mn)
    return partial_M


@triton.jit(do_not_specialize=["num_rows"])
def gated_backward_kernel(
    grad_ptr,
    weight_source,
    scores_ptr,
    hidden_ptr,
    grad_hidden_ptr,
    activated_ptr,
    partial_ptr,
    offsets_ptr,
    row_order_ptr,
    num_rows,
    num_experts,
    inner,
    width,
    stride_weight_e,
    stride_weight_k,
    stride_weight_n,
    WEIGHT_FORM: tl.constexpr,
    TOP_K: tl.constexpr,
    NEEDS_SCORES: tl.constexpr,
    NEEDS_HIDDEN: tl.constexpr,
    NEEDS_ACTIVATED: tl.constexpr,
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
    """Writes the results that depend on `dA' = dO W2`, tile by tile.

    `partial[column tile, row]` is the sum of `dA' * A` over the columns of the tile, `grad_hidden`
    is `act'(H)[score * dA']`, and `activated` is `score * A`.
    """
    ends_E, tiles_E = count_row_tiles(offsets_ptr, num_rows, num_experts, BLOCK_E, BLOCK_M, False)
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
        acc_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
        if NEEDS_SCORES or NEEDS_HIDDEN:
            acc_MN, _ = multiply_rows(
                grad_ptr,
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
                "pointers",
                WEIGHT_FORM,
                TOP_K,
                False,
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
        offs_m = start_m + tl.arange(0, BLOCK_M)
        known_m = tl.minimum(offs_m, end_m - 1)
        score_M = tl.load(scores_ptr + tl.load(row_order_ptr + known_m)).to(ACC)
        partial_M = tl.zeros((BLOCK_M,), dtype=ACC)
        # In quarters: the sums and both halves of H would not fit into registers at once.
        left_MN, right_MN = split_halves(acc_MN, BLOCK_M, BLOCK_N)
        for half in tl.static_range(2):
            first_MN, second_MN = split_halves(
                left_MN if half == 0 else right_MN, BLOCK_M, BLOCK_N // 2
            )
            for quarter in tl.static_range(2):
                start_n = tile_n * BLOCK_N + (2 * half + quarter) * (BLOCK_N // 4)
                partial_M += finish_gated_backward(
                    first_MN if quarter == 0 else second_MN,
                    score_M,
                    offs_m,
                    end_m,
                    start_n + tl.arange(0, BLOCK_N // 4),
                    width,
                    hidden_ptr,
                    grad_hidden_ptr,
                    activated_ptr,
                    NEEDS_SCORES,
                    NEEDS_HIDDEN,
                    NEEDS_ACTIVATED,
                    ACTIVATION,
                    LIMIT,
                    ALPHA,
                    ACC,
                )
        if NEEDS_SCORES:
            partial_offs_m = tile_n.to(tl.int64) * num_rows + offs_m
            tl.store(partial_ptr + partial_offs_m, partial_M, mask=offs_m < end_m)


@triton.jit(do_not_specialize=["num_rows"])
def score_grad_kernel(
    partial_ptr,
    grad_ptr,
    bias_ptr,
    grad_scores_ptr,
    offsets_ptr,
    row_order_ptr,
    num_rows,
    num_experts,
    num_partials,
    inner,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    """Adds the partial sums of a row in order and, with a bias, `dO * b2`."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < tl.load(offsets_ptr + num_experts)
    acc_M = tl.zeros((BLOCK_M,), dtype=ACC)
    partial_ptrs = partial_ptr + offs_m
    for _ in range(0, num_partials):
        acc_M += tl.load(partial_ptrs, mask=mask_m, other=0)
        partial_ptrs += num_rows
    target_M = tl.load(row_order_ptr + offs_m, mask=offs_m < num_rows, other=0)
    if HAS_BIAS:
        offs_e = tl.arange(0, BLOCK_E)
        end_E = tl.load(offsets_ptr + offs_e + 1, mask=offs_e < num_experts, other=2**31 - 1)
        expert_M = tl.sum((end_E[None, :] <= offs_m[:, None]).to(tl.int32), axis=1).to(tl.int64)
        token_M = (target_M // TOP_K).to(tl.int64)
        for start_k in range(0, inner, BLOCK_K):
            offs_k = start_k + tl.arange(0, BLOCK_K)
            mask_mk = mask_m[:, None] & (offs_k < inner)[None, :]
            grad_ptrs = grad_ptr + token_M[:, None] * inner + offs_k[None, :]
            bias_ptrs = bias_ptr + expert_M[:, None] * inner + offs_k[None, :]
            grad_MK = tl.load(grad_ptrs, mask=mask_mk, other=0).to(ACC)
            acc_M += tl.sum(grad_MK * tl.load(bias_ptrs, mask=mask_mk, other=0).to(ACC), axis=1)
    tl.store(grad_scores_ptr + target_M, acc_M, mask=offs_m < num_rows)


def gated_backward(
    grad: Tensor,
    down_proj: Tensor,
    down_bias: Tensor | None,
    scores: Tensor,
    hidden: Tensor,
    offsets: Tensor,
    row_order: Tensor,
    gate: tuple[str, float, float],
    needs_scores: bool,
    needs_hidden: bool,
    needs_activated: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of scores and pre-activations, and the activations times score.

    Args:
        grad: `[T, D]`, contiguous.
        down_proj: `[E, D, F]`, any strides.
        down_bias: `[E, D]` or None.
        scores: `[T, K]`, contiguous.
        hidden: `[N, 2F]`.
        offsets: `[E + 1]`.
        row_order: `[N]`.
        gate: Activation, limit and alpha.
        needs_scores: Whether the gradient of the scores is required; otherwise it is empty.
        needs_hidden: Whether the gradient of the pre-activations is required; likewise.
        needs_activated: Whether the activations times score are required; likewise.
        tile: Tile to use instead of the one that `choose` returns.
    """
    num_experts, inner, width = down_proj.shape
    (num_rows,), top_k, place = row_order.shape, scores.shape[1], place_of(grad)
    launch, source, num_partials = _gated_backward(
        place,
        num_rows,
        layout_of(down_proj),
        top_k,
        (needs_scores, needs_hidden, needs_activated),
        gate,
        precision(grad.dtype),
        tile,
    )
    partial = scores.new_empty(num_partials if needs_scores else 0, num_rows)
    grad_scores = torch.empty_like(scores) if needs_scores else grad.new_empty(0)
    grad_hidden = grad.new_empty(num_rows if needs_hidden else 0, 2 * width)
    activated = grad.new_empty(num_rows if needs_activated else 0, width)
    if num_rows == 0:
        return grad_scores, grad_hidden, activated
    if width:
        launch(
            grad,
            source.of(down_proj.transpose(1, 2)),
            scores,
            hidden,
            grad_hidden,
            activated,
            partial,
            offsets,
            row_order,
        )
    if needs_scores:
        sizes = (num_rows, num_experts, num_partials, inner)
        launch = _score_gradient(place, sizes, top_k, down_bias is not None, grad.dtype)
        bias = None if down_bias is None else down_bias.contiguous()
        launch(partial, grad, bias, grad_scores, offsets, row_order)
    return grad_scores, grad_hidden, activated


@planned
def _gated_backward(
    place: Place,
    num_rows: int,
    down_proj: Layout,
    top_k: int,
    needs: tuple[bool, bool, bool],
    gate: tuple[str, float, float],
    precision: str,
    tile: Tile | None,
) -> tuple[Launch, Source, int]:
    (num_experts, inner, width), dtype = down_proj.shape, down_proj.dtype
    rows, tf32 = rows_bucket(num_rows, num_experts), precision == "tf32"
    problem = Problem("gated_backward", inner, width, 0, num_experts, top_k, dtype, rows, tf32)
    tile = tile or choose(problem, place.gpu)
    num_partials = triton.cdiv(width, tile.block_n)
    num_tiles = (num_rows // tile.block_m + num_experts) * num_partials
    source = weight_source(down_proj.transposed(), tile)
    needs_scores, needs_hidden, needs_activated = needs
    launch = Launch(
        place,
        gated_backward_kernel,
        (num_programs(problem, tile, num_tiles, place.gpu),),
        (num_rows, num_experts, inner, width, *down_proj.strides),
        {
            "WEIGHT_FORM": source.form,
            "TOP_K": top_k,
            "NEEDS_SCORES": needs_scores,
            "NEEDS_HIDDEN": needs_hidden,
            "NEEDS_ACTIVATED": needs_activated,
            **gate_constants(gate),
            **product_constants(problem, tile),
        },
    )
    return launch, source, num_partials


@planned
def _score_gradient(
    place: Place, sizes: tuple[int, ...], top_k: int, has_bias: bool, dtype: torch.dtype
) -> Launch:
    num_rows, num_experts, _, _ = sizes
    return Launch(
        place,
        score_grad_kernel,
        (triton.cdiv(num_rows, SCORE_BLOCK),),
        sizes,
        {
            "TOP_K": top_k,
            "HAS_BIAS": has_bias,
            "BLOCK_E": triton.next_power_of_2(num_experts + 1),
            "BLOCK_M": SCORE_BLOCK,
            "BLOCK_K": SCORE_BLOCK_K,
            "ACC": accumulator(dtype),
        },
    )
