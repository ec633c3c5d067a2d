"""Tile products shared by several kernels: rows of x times the weight of their expert."""

from __future__ import annotations

import triton
import triton.language as tl

from unimoe_kernels._triton.loads import advance, place_rows, place_weight, read_rows, read_weight


@triton.jit
def add_product(a_MK, b_KN, acc_MN, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Returns `acc + a @ b`."""
    if UPCAST:
        a_MK, b_KN = a_MK.to(acc_MN.dtype), b_KN.to(acc_MN.dtype)
    return tl.dot(a_MK, b_KN, acc_MN, input_precision=PRECISION, out_dtype=acc_MN.dtype)


@triton.jit
def multiply_rows(
    x_source,
    weight_source,
    row_order_ptr,
    expert,
    start_m,
    end_m,
    start_n,
    offs_n,
    mask_n,
    offs_k,
    num_experts,
    inner,
    width,
    stride_weight_e,
    stride_weight_n,
    stride_weight_k,
    stride_weight_second,
    X_FORM: tl.constexpr,
    WEIGHT_FORM: tl.constexpr,
    TOP_K: tl.constexpr,
    TAIL: tl.constexpr,
    TWO: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Returns `[M, N]`: rows of x, `start_m` to `end_m`, times columns of the expert's weight.

    With `TWO` the second result is the product with the columns `width` further on, at an offset of
    `stride_weight_second` elements; otherwise it is zero. With `TAIL` the expert may be
    `num_experts`, which stands for rows that no expert owns: nothing is read, and the products are
    zero.
    """
    x_place = place_rows(
        x_source, start_m, end_m, offs_k, inner, row_order_ptr, TOP_K, BLOCK_M, X_FORM
    )
    weight_place = place_weight(
        weight_source,
        expert,
        offs_n,
        offs_k,
        stride_weight_e,
        stride_weight_n,
        stride_weight_k,
        WEIGHT_FORM,
    )
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    second_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    end_k = tl.where(expert < num_experts, inner, 0) if TAIL else inner
    for start_k in range(0, end_k, BLOCK_K):
        mask_k = offs_k < inner - start_k
        x_MK = read_rows(x_source, x_place, start_k, mask_k, EVEN_K, X_FORM)
        weight_KN = read_weight(
            weight_source,
            weight_place,
            start_n,
            start_k,
            mask_k,
            mask_n,
            EVEN_K,
            EVEN_N,
            WEIGHT_FORM,
        )
        if TWO:
            second_KN = read_weight(
                weight_source,
                advance(weight_place, stride_weight_second, WEIGHT_FORM),
                width + start_n,
                start_k,
                mask_k,
                mask_n,
                EVEN_K,
                EVEN_N,
                WEIGHT_FORM,
            )
        acc_MN = add_product(x_MK, weight_KN, acc_MN, PRECISION, UPCAST)
        if TWO:
            second_MN = add_product(x_MK, second_KN, second_MN, PRECISION, UPCAST)
        x_place = advance(x_place, BLOCK_K, X_FORM)
        weight_place = advance(weight_place, BLOCK_K * stride_weight_k, WEIGHT_FORM)
    return acc_MN, second_MN
