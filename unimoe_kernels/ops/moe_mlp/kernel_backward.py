"""Triton kernels of the backward of the fused `moe_mlp`.

They compute `dA' = dO W2` and need it nowhere else: the gradients of the scores and of the
pre-activations, and the weighted activations for the gradient of W2, come out of its registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unimoe_kernels._triton.activation import activate, activate_backward, gate_constants
from unimoe_kernels._triton.descriptors import describe_weight
from unimoe_kernels._triton.launch import accumulator, device_of, matmul_constants, precision
from unimoe_kernels._triton.loads import advance, place_rows, place_weight, read_rows, read_weight
from unimoe_kernels._triton.schedule import count_row_tiles, locate_rows, locate_tile
from unimoe_kernels._triton.tiles import Problem, Tile, choose, num_programs, rows_bucket

SCORE_BLOCK = 32  # rows whose score gradients one program sums
SCORE_BLOCK_D = 64


@triton.jit
def halves(tile, M: tl.constexpr, N: tl.constexpr):
    """Returns the left and the right half of a tile `[M, N]`."""
    return tile.reshape(M, 2, N // 2).permute(0, 2, 1).split()


@triton.jit
def finish_gated_backward(
    grad,
    score,
    row,
    end_row,
    column,
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
    """Writes what comes of some columns of dA'; returns the sum of `dA' * A` over them."""
    mask = (row < end_row)[:, None] & (column < width)[None, :]
    row = row.to(tl.int64)[:, None]
    hidden = row * (2 * width) + column[None, :]
    gate = tl.load(hidden_ptr + hidden, mask=mask, other=0).to(ACC)
    up = tl.load(hidden_ptr + hidden + width, mask=mask, other=0).to(ACC)
    dtype = hidden_ptr.dtype.element_ty
    partial = tl.zeros(score.shape, dtype=ACC)
    if NEEDS_SCORES or NEEDS_ACTIVATED:
        activated = activate(gate, up, ACTIVATION, LIMIT, ALPHA)
        if NEEDS_SCORES:
            partial = tl.sum(grad * activated, axis=1)
        if NEEDS_ACTIVATED:
            out = (score[:, None] * activated).to(dtype)
            tl.store(activated_ptr + row * width + column[None, :], out, mask=mask)
    if NEEDS_HIDDEN:
        grad_gate, grad_up = activate_backward(
            score[:, None] * grad, gate, up, ACTIVATION, LIMIT, ALPHA
        )
        tl.store(grad_hidden_ptr + hidden, grad_gate.to(dtype), mask=mask)
        tl.store(grad_hidden_ptr + hidden + width, grad_up.to(dtype), mask=mask)
    return partial


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
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes what needs `dA' = dO W2`, tile by tile.

    `partial[column tile, row]` gets the sum of `dA' * A` over the columns of the tile,
    `grad_hidden` `act'(H)[score * dA']`, and `activated` `score * A`.
    """
    ends, tiles = count_row_tiles(offsets_ptr, num_rows, num_experts, EXPERTS, BLOCK_M, False)
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
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
        if NEEDS_SCORES or NEEDS_HIDDEN:
            grad_place = place_rows(
                grad_ptr, first_row, end_row, step, inner, row_order_ptr, TOP_K, BLOCK_M, "pointers"
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
            for k in range(0, inner, BLOCK_K):
                known = step < inner - k
                grad = read_rows(grad_ptr, grad_place, k, known, EVEN_K, "pointers")
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
                    grad, weight = grad.to(ACC), weight.to(ACC)
                total = tl.dot(grad, weight, total, input_precision=PRECISION, out_dtype=ACC)
                grad_place = advance(grad_place, BLOCK_K, "pointers")
                weight_place = advance(weight_place, BLOCK_K * stride_weight_k, WEIGHT_FORM)
        row = first_row + tl.arange(0, BLOCK_M)
        known_row = tl.minimum(row, end_row - 1)
        score = tl.load(scores_ptr + tl.load(row_order_ptr + known_row)).to(ACC)
        partial = tl.zeros((BLOCK_M,), dtype=ACC)
        # Quarter by quarter: sums and both halves of H would not fit into the registers at once.
        left, right = halves(total, BLOCK_M, BLOCK_N)
        for half in tl.static_range(2):
            first, second = halves(left if half == 0 else right, BLOCK_M, BLOCK_N // 2)
            for quarter in tl.static_range(2):
                start = column_tile * BLOCK_N + (2 * half + quarter) * (BLOCK_N // 4)
                partial += finish_gated_backward(
                    first if quarter == 0 else second,
                    score,
                    row,
                    end_row,
                    start + tl.arange(0, BLOCK_N // 4),
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
            address = column_tile.to(tl.int64) * num_rows + row
            tl.store(partial_ptr + address, partial, mask=row < end_row)


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
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sums the partial sums of a row in order, and with a bias adds `dO * b2`."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    routed = row < tl.load(offsets_ptr + num_experts)
    total = tl.zeros((BLOCK,), dtype=ACC)
    partial_ptrs = partial_ptr + row
    for _ in range(0, num_partials):
        total += tl.load(partial_ptrs, mask=routed, other=0)
        partial_ptrs += num_rows
    target = tl.load(row_order_ptr + row, mask=row < num_rows, other=0)
    if HAS_BIAS:
        candidate = tl.arange(0, EXPERTS)
        end = tl.load(offsets_ptr + candidate + 1, mask=candidate < num_experts, other=2**31 - 1)
        expert = tl.sum((end[None, :] <= row[:, None]).to(tl.int32), axis=1).to(tl.int64)
        token = (target // TOP_K).to(tl.int64)
        for first in range(0, inner, BLOCK_D):
            column = first + tl.arange(0, BLOCK_D)
            mask = routed[:, None] & (column < inner)[None, :]
            grad_ptrs = grad_ptr + token[:, None] * inner + column[None, :]
            bias_ptrs = bias_ptr + expert[:, None] * inner + column[None, :]
            grad = tl.load(grad_ptrs, mask=mask, other=0).to(ACC)
            total += tl.sum(grad * tl.load(bias_ptrs, mask=mask, other=0).to(ACC), axis=1)
    tl.store(grad_scores_ptr + target, total, mask=row < num_rows)


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
        needs_scores: Whether the first is wanted; else it is empty. Likewise for the others.
        needs_hidden: See there.
        needs_activated: See there.
        tile: Taken instead of the one that `choose` returns.
    """
    num_experts, inner, width = down_proj.shape
    num_rows, top_k = row_order.shape[0], scores.shape[1]
    device = device_of(grad)
    rows = rows_bucket(num_rows, num_experts)
    dtype, tf32 = grad.dtype, precision(grad.dtype) == "tf32"
    problem = Problem("gated_backward", inner, width, 0, num_experts, top_k, dtype, rows, tf32)
    tile = tile or choose(problem, device)
    num_partials = triton.cdiv(width, tile.block_n)
    experts = triton.next_power_of_2(num_experts + 1)
    partial = scores.new_empty(num_partials if needs_scores else 0, num_rows)
    grad_scores = torch.empty_like(scores) if needs_scores else grad.new_empty(0)
    grad_hidden = grad.new_empty(num_rows if needs_hidden else 0, 2 * width)
    activated = grad.new_empty(num_rows if needs_activated else 0, width)
    if num_rows == 0:
        return grad_scores, grad_hidden, activated
    weight_source, weight_form = describe_weight(down_proj.transpose(1, 2), tile)
    with torch.cuda.device_of(grad):
        if width:
            num_tiles = (num_rows // tile.block_m + num_experts) * num_partials
            gated_backward_kernel[(num_programs(problem, tile, num_tiles, device),)](
                grad,
                weight_source,
                scores,
                hidden,
                grad_hidden,
                activated,
                partial,
                offsets,
                row_order,
                num_rows,
                num_experts,
                inner,
                width,
                *down_proj.stride(),
                WEIGHT_FORM=weight_form,
                TOP_K=top_k,
                NEEDS_SCORES=needs_scores,
                NEEDS_HIDDEN=needs_hidden,
                NEEDS_ACTIVATED=needs_activated,
                **gate_constants(gate),
                EVEN_N=width % tile.block_n == 0,
                EVEN_K=inner % tile.block_k == 0,
                EXPERTS=experts,
                **tile.constants(),
                **matmul_constants(grad.dtype),
            )
        if needs_scores:
            score_grad_kernel[(triton.cdiv(num_rows, SCORE_BLOCK),)](
                partial,
                grad,
                None if down_bias is None else down_bias.contiguous(),
                grad_scores,
                offsets,
                row_order,
                num_rows,
                num_experts,
                num_partials,
                inner,
                TOP_K=top_k,
                HAS_BIAS=down_bias is not None,
                EXPERTS=experts,
                BLOCK=SCORE_BLOCK,
                BLOCK_D=SCORE_BLOCK_D,
                ACC=accumulator(grad.dtype),
            )
    return grad_scores, grad_hidden, activated
