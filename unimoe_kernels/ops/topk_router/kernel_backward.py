"""Triton kernels of the gradient of `topk_router`: a few tokens per program, all experts at once.

The load-balancing loss depends on how often each expert is chosen, which is counted first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unimoe_kernels._triton.launch import accumulator
from unimoe_kernels._triton.planned import Launch, Place, place_of, planned
from unimoe_kernels._triton.router import (
    TINY,
    counted_tokens,
    pick,
    program_shape,
    read_tokens,
    sigmoid_of,
    softmax_of,
)

COUNT_ELEMENTS = 8192  # comparisons that a program holds at a time


@triton.jit(do_not_specialize=["num_tokens"])
def count_choices_kernel(
    ids_ptr,
    mask_ptr,
    counts_ptr,
    num_tokens,
    num_experts,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Adds the counted choices of expert e to `counts[e]`, and the tokens to `counts[E]`."""
    offs_e = tl.arange(0, BLOCK_E)
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    counted_T = counted_tokens(mask_ptr, offs_t, num_tokens, HAS_MASK)
    count_E = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for k in range(CHOICES):
        chosen_T = tl.load(ids_ptr + offs_t.to(tl.int64) * TOP_K + k, mask=counted_T, other=-1)
        count_E += tl.sum((offs_e[None, :] == chosen_T[:, None]).to(tl.int32), axis=0)
    # Integer atomics are deterministic: the sum is the same in any order.
    tl.atomic_add(counts_ptr + offs_e, count_E, mask=(offs_e < num_experts) & (count_E > 0))
    tl.atomic_add(counts_ptr + num_experts, tl.sum(counted_T.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["num_tokens"])
def topk_router_backward_kernel(
    grad_scores_ptr,
    grad_balancing_ptr,
    grad_z_ptr,
    logits_ptr,
    ids_ptr,
    mask_ptr,
    counts_ptr,
    grad_logits_ptr,
    num_tokens,
    num_experts,
    TOP_K: tl.constexpr,
    MODE: tl.constexpr,
    CHOICES: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ACC: tl.constexpr,
):
    """Writes the gradient with respect to the logits of some tokens."""
    SIGMOID: tl.constexpr = MODE == "sigmoid" or MODE == "sigmoid_renorm"
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < num_experts
    offs_k = tl.arange(0, BLOCK_K)
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < num_tokens
    logits_TE, counted_T = read_tokens(
        logits_ptr, mask_ptr, offs_t, num_tokens, offs_e, num_experts, HAS_MASK, ACC
    )
    softmax_TE, logsumexp_T = softmax_of(logits_TE, mask_e)
    num_counted = tl.maximum(tl.load(counts_ptr + num_experts), 1).to(ACC)
    fraction_E = tl.load(counts_ptr + offs_e, mask=mask_e, other=0).to(ACC) / (
        num_counted * CHOICES
    )
    grad_probability_E = tl.load(grad_balancing_ptr) * num_experts * fraction_E / num_counted
    grad_probability_TE = tl.where(counted_T[:, None], grad_probability_E[None, :], 0)

    choices_offs_tk = offs_t.to(tl.int64)[:, None] * TOP_K + offs_k[None, :]
    mask_tk = mask_t[:, None] & (offs_k < TOP_K)[None, :]
    ids_TK = tl.load(ids_ptr + choices_offs_tk, mask=mask_tk, other=-1)
    grad_scores_TK = tl.load(grad_scores_ptr + choices_offs_tk, mask=mask_tk, other=0) * SCALE
    if SIGMOID:
        share_TE, share_sum_T = sigmoid_of(logits_TE, mask_e)
        inner_T = tl.sum(grad_probability_TE * share_TE, axis=1) / share_sum_T
        grad_TE = (grad_probability_TE - inner_T[:, None]) / share_sum_T[:, None]
        if MODE == "sigmoid_renorm":
            chosen_TK = gather_chosen(share_TE, offs_e, ids_TK, offs_k, TOP_K)
            chosen_sum_T = tl.sum(chosen_TK, axis=1) + TINY
            inner_T = tl.sum(grad_scores_TK * chosen_TK, axis=1) / chosen_sum_T
            grad_scores_TK = (grad_scores_TK - inner_T[:, None]) / chosen_sum_T[:, None]
        grad_TE += scatter_chosen(grad_scores_TK, offs_e, ids_TK, offs_k, TOP_K)
        grad_TE = grad_TE * share_TE * (1 - share_TE)
    else:
        if MODE == "softmax_topk":
            grad_probability_TE += scatter_chosen(grad_scores_TK, offs_e, ids_TK, offs_k, TOP_K)
        inner_T = tl.sum(grad_probability_TE * softmax_TE, axis=1)
        grad_TE = softmax_TE * (grad_probability_TE - inner_T[:, None])
        if MODE != "softmax_topk":
            chosen_TK = gather_chosen(logits_TE, offs_e, ids_TK, offs_k, TOP_K)
            scores_TK, _ = softmax_of(chosen_TK, offs_k < TOP_K)
            inner_T = tl.sum(grad_scores_TK * scores_TK, axis=1)
            grad_scores_TK = scores_TK * (grad_scores_TK - inner_T[:, None])
            grad_TE += scatter_chosen(grad_scores_TK, offs_e, ids_TK, offs_k, TOP_K)
    slope_T = 2 * logsumexp_T * (tl.load(grad_z_ptr) / num_counted)
    grad_TE += softmax_TE * tl.where(counted_T, slope_T, 0)[:, None]
    logits_offs_te = offs_t.to(tl.int64)[:, None] * num_experts + offs_e[None, :]
    grad_logits_TE = grad_TE.to(grad_logits_ptr.dtype.element_ty)
    tl.store(
        grad_logits_ptr + logits_offs_te, grad_logits_TE, mask=mask_t[:, None] & mask_e[None, :]
    )


@triton.jit
def gather_chosen(value_TE, offs_e, ids_TK, offs_k, TOP_K: tl.constexpr):
    """Returns `[BLOCK_T, BLOCK_K]`, the values of the chosen experts."""
    chosen_TK = tl.zeros(ids_TK.shape, dtype=value_TE.dtype)
    for k in range(TOP_K):
        own_T = tl.sum(tl.where((offs_k == k)[None, :], ids_TK, 0), axis=1)
        chosen_TK = tl.where(
            (offs_k == k)[None, :], pick(value_TE, offs_e, own_T)[:, None], chosen_TK
        )
    return chosen_TK


@triton.jit
def scatter_chosen(value_TE, offs_e, ids_TK, offs_k, TOP_K: tl.constexpr):
    """Returns `[BLOCK_T, BLOCK_E]`, the values at the chosen experts and zeros elsewhere."""
    spread_TE = tl.zeros((value_TE.shape[0], offs_e.shape[0]), dtype=value_TE.dtype)
    for k in range(TOP_K):
        own_T = tl.sum(tl.where((offs_k == k)[None, :], ids_TK, 0), axis=1)
        part_T = tl.sum(tl.where((offs_k == k)[None, :], value_TE, 0), axis=1)
        spread_TE += tl.where(offs_e[None, :] == own_T[:, None], part_T[:, None], 0)
    return spread_TE


def topk_router_backward(
    grad_scores: Tensor,
    grad_balancing: Tensor,
    grad_z: Tensor,
    logits: Tensor,
    ids: Tensor,
    token_mask: Tensor | None,
    mode: str,
    scale: float,
    balance: str,
) -> Tensor:
    """Returns the gradient with respect to contiguous logits."""
    num_tokens, num_experts = logits.shape
    grad_logits = logits.new_empty(logits.shape)
    if num_tokens == 0:
        return grad_logits
    counts = ids.new_zeros(num_experts + 1)
    count, differentiate = _launches(
        place_of(logits),
        (num_tokens, num_experts),
        logits.dtype,
        ids.shape[1],
        mode,
        scale,
        balance,
        token_mask is not None,
    )
    count(ids, token_mask, counts)
    differentiate(grad_scores, grad_balancing, grad_z, logits, ids, token_mask, counts, grad_logits)
    return grad_logits


@planned
def _launches(
    place: Place,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    top_k: int,
    mode: str,
    scale: float,
    balance: str,
    has_mask: bool,
) -> tuple[Launch, Launch]:
    num_tokens, num_experts = sizes
    block_e, block_t, num_warps = program_shape(num_experts, dtype)
    count_block_t = max(1, min(64, COUNT_ELEMENTS // block_e))
    common = {
        "TOP_K": top_k,
        "CHOICES": top_k if balance == "all" else 1,
        "HAS_MASK": has_mask,
        "BLOCK_E": block_e,
    }
    count = Launch(
        place,
        count_choices_kernel,
        (triton.cdiv(num_tokens, count_block_t),),
        sizes,
        {"BLOCK_T": count_block_t, **common},
    )
    differentiate = Launch(
        place,
        topk_router_backward_kernel,
        (triton.cdiv(num_tokens, block_t),),
        sizes,
        {
            "MODE": mode,
            "SCALE": scale,
            "BLOCK_K": triton.next_power_of_2(top_k),
            "BLOCK_T": block_t,
            "ACC": accumulator(dtype),
            "num_warps": num_warps,
            **common,
        },
    )
    return count, differentiate
