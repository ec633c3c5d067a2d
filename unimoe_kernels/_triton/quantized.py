"""Products of rows with quantised weights, which are converted to floats after they are loaded.

A block of a weight `[E, out, in]` has rows `R` and columns `C` in the stored layout; if needed, it
is transposed in registers. The integers are exact in every float dtype of the matmuls. The constant
`SCALES` determines what is multiplied by the scales:

`"row"`     the finished sums; there is one scale per output row
`"sums"`    the sums of each step along K, which lies in one group: cheap where rows are few
`"weight"`  the integers, whose products are then rounded to the dtype of the rows
"""

from __future__ import annotations

import triton
import triton.language as tl

from unimoe_kernels._triton.loads import load_block, place_rows, read_rows
from unimoe_kernels._triton.matmul import add_product

# The zero point of "int4" without zero points per group.
INT4_OFFSET = tl.constexpr(8)


@triton.jit
def groups_of_block(GROUP: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns the number of groups in a row of a block; `GROUP` is 0 if a group is a whole row."""
    if GROUP == 0 or GROUP >= BLOCK_C:
        return 1
    else:
        return BLOCK_C // GROUP


@triton.jit
def first_group(start_c, GROUP: tl.constexpr):
    """Returns the index of the group that contains a column."""
    if GROUP == 0:
        return 0
    else:
        return start_c // GROUP


@triton.jit
def read_integers(
    values_ptrs,
    zeros_ptrs,
    mask_r,
    mask_b,
    mask_g,
    EVEN_R: tl.constexpr,
    EVEN_C: tl.constexpr,
    FOUR_BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
):
    """Reads int8 `[R, C]` and subtracts the zero points.

    Masked elements are 0 for `"int8"`, and 0 minus the zero point for `"int4"`.
    """
    integers_RC = load_block(values_ptrs, mask_r, mask_b, EVEN_R, EVEN_C)
    if FOUR_BITS:
        low_RB, high_RB = integers_RC & 15, integers_RC >> 4
        integers_RC = tl.interleave(low_RB, high_RB).to(tl.int8)
        if HAS_ZEROS:
            zeros_RG = load_block(zeros_ptrs, mask_r, mask_g, EVEN_R, EVEN_C).to(tl.int8)
            integers_RC -= spread(zeros_RG, integers_RC.shape[0], integers_RC.shape[1])
        else:
            integers_RC -= INT4_OFFSET
    return integers_RC


@triton.jit
def spread(groups_RG, R: tl.constexpr, C: tl.constexpr):
    """Expands one value per group of columns, `[R, G]`, to `[R, C]`."""
    G: tl.constexpr = groups_RG.shape[1]
    if G == 1:
        return tl.broadcast_to(groups_RG, (R, C))
    else:
        return tl.broadcast_to(groups_RG[:, :, None], (R, G, C // G)).reshape(R, C)


@triton.jit
def multiply_quantized_rows(
    x_source,
    values_ptr,
    scales_ptr,
    zeros_ptr,
    row_order_ptr,
    expert,
    start_m,
    end_m,
    start_n,
    begin_k,
    end_k,
    num_experts,
    inner,
    width,
    shift,
    stored_rows,
    X_FORM: tl.constexpr,
    TOP_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    FOUR_BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES: tl.constexpr,
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
    """Returns `[M, N]`: rows `start_m` to `end_m` of x times columns of the expert's weight.

    The sums run from `begin_k` to `end_k` of `inner`. The columns are the rows of the stored weight
    or, with `TRANSPOSED`, its columns. With `TWO` the second result is the product with the columns
    that are offset by `shift`; otherwise it is zero. Expert `num_experts` stands for rows of no
    expert: nothing is read for them, and their products are zero.
    """
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < width
    BLOCK_C: tl.constexpr = BLOCK_N if TRANSPOSED else BLOCK_K
    PACKED: tl.constexpr = 2 if FOUR_BITS else 1
    GROUPS: tl.constexpr = groups_of_block(GROUP, BLOCK_C)
    x_place = place_rows(
        x_source, start_m, end_m, begin_k + offs_k, inner, row_order_ptr, TOP_K, BLOCK_M, X_FORM
    )
    stored_width = width if TRANSPOSED else inner
    groups = 1 if GROUP == 0 else stored_width // GROUP
    # Rows of the block in the stored layout, and its first column.
    base = expert.to(tl.int64) * stored_rows
    offs_r = base + (begin_k + offs_k if TRANSPOSED else offs_n)
    start_c = start_n if TRANSPOSED else begin_k
    row_bytes = stored_width // PACKED
    offs_b = tl.arange(0, BLOCK_C // PACKED)
    offs_g = tl.arange(0, GROUPS)
    values_ptrs = values_ptr + offs_r[:, None] * row_bytes + (start_c // PACKED + offs_b)[None, :]
    offs_rg = offs_r[:, None] * groups + offs_g[None, :]
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    second_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    end_k = tl.where(expert < num_experts, end_k, 0)
    for start_k in range(begin_k, end_k, BLOCK_K):
        mask_k = offs_k < inner - start_k
        x_MK = read_rows(x_source, x_place, start_k, mask_k, EVEN_K, X_FORM)
        first_c = start_n if TRANSPOSED else start_k
        at_g = first_group(first_c, GROUP)
        acc_MN = add_quantized(
            x_MK,
            values_ptrs,
            scales_ptr,
            zeros_ptr,
            offs_rg + at_g,
            mask_k if TRANSPOSED else mask_n,
            offs_b < (stored_width - first_c) // PACKED,
            offs_g < groups - at_g,
            acc_MN,
            TRANSPOSED,
            EVEN_K if TRANSPOSED else EVEN_N,
            EVEN_N if TRANSPOSED else EVEN_K,
            FOUR_BITS,
            HAS_ZEROS,
            SCALES,
            ACC,
            PRECISION,
            UPCAST,
        )
        if TWO:
            second_MN = add_quantized(
                x_MK,
                values_ptrs + tl.cast(shift, tl.int64) * row_bytes,
                scales_ptr,
                zeros_ptr,
                offs_rg + at_g + tl.cast(shift, tl.int64) * groups,
                mask_n,
                offs_b < (stored_width - first_c) // PACKED,
                offs_g < groups - at_g,
                second_MN,
                TRANSPOSED,
                EVEN_N,
                EVEN_K,
                FOUR_BITS,
                HAS_ZEROS,
                SCALES,
                ACC,
                PRECISION,
                UPCAST,
            )
        if X_FORM == "pointers":
            x_place += BLOCK_K
        if TRANSPOSED:
            values_ptrs += BLOCK_K * row_bytes
            offs_rg += BLOCK_K * groups
        else:
            values_ptrs += BLOCK_K // PACKED
    if SCALES == "row":
        row_mask_n = offs_n < tl.where(expert < num_experts, width, 0)
        scale_ptrs = scales_ptr + base + offs_n
        acc_MN *= tl.load(scale_ptrs, mask=row_mask_n, other=0).to(ACC)[None, :]
        if TWO:
            second_MN *= tl.load(scale_ptrs + shift, mask=row_mask_n, other=0).to(ACC)[None, :]
    return acc_MN, second_MN


@triton.jit
def add_quantized(
    x_MK,
    values_ptrs,
    scales_ptr,
    zeros_ptr,
    offs_rg,
    mask_r,
    mask_b,
    mask_g,
    acc_MN,
    TRANSPOSED: tl.constexpr,
    EVEN_R: tl.constexpr,
    EVEN_C: tl.constexpr,
    FOUR_BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    SCALES: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Returns `acc + x @ weight`; with `SCALES` `"row"` the scales are not applied yet."""
    zeros_ptrs = zeros_ptr + offs_rg if HAS_ZEROS else None
    integers_RC = read_integers(
        values_ptrs, zeros_ptrs, mask_r, mask_b, mask_g, EVEN_R, EVEN_C, FOUR_BITS, HAS_ZEROS
    )
    if SCALES == "weight":
        scales_RG = load_block(scales_ptr + offs_rg, mask_r, mask_g, EVEN_R, EVEN_C).to(ACC)
        scales_RC = spread(scales_RG, integers_RC.shape[0], integers_RC.shape[1])
        weight_RC = (integers_RC.to(ACC) * scales_RC).to(x_MK.dtype)
    else:
        # Triton's interpreter cannot convert integers to bfloat16.
        weight_RC = integers_RC.to(ACC if UPCAST else x_MK.dtype)
    weight_KN = weight_RC if TRANSPOSED else weight_RC.T
    if SCALES == "sums":
        part_MN = tl.zeros(acc_MN.shape, dtype=ACC)
        part_MN = add_product(x_MK, weight_KN, part_MN, PRECISION, UPCAST)
        scale_ptrs = tl.sum(offs_rg, axis=1)  # there is one group
        scale_N = tl.load(scales_ptr + scale_ptrs, mask=mask_r, other=0).to(ACC)
        return acc_MN + part_MN * scale_N[None, :]
    else:
        return add_product(x_MK, weight_KN, acc_MN, PRECISION, UPCAST)


@triton.jit
def expert_of_rows(offsets_ptr, offs_m, num_experts, BLOCK_E: tl.constexpr):
    """Returns the expert of each row, int64; `num_experts` for rows of no expert."""
    offs_e = tl.arange(0, BLOCK_E)
    end_E = tl.load(offsets_ptr + offs_e + 1, mask=offs_e < num_experts, other=2**31 - 1)
    return tl.sum((end_E[None, :] <= offs_m[:, None]).to(tl.int32), axis=1).to(tl.int64)
