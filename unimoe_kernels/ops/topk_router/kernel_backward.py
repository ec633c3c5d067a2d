"""Triton kernels of the gradient of `topk_router`: a few tokens a program, all experts at once.

The load-balancing loss depends on how often each expert is chosen, which is counted first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unimoe_kernels._triton.launch import accumulator
from unimoe_kernels._triton.router import (
    TINY,
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
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds to `counts[e]` the counted choices of expert e, and to `counts[E]` the tokens."""
    expert = tl.arange(0, EXPERTS)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counted = token < num_tokens
    if HAS_MASK:
        counted = tl.load(mask_ptr + token, mask=counted, other=0).to(tl.int1)
    total = tl.zeros((EXPERTS,), dtype=tl.int32)
    for k in range(CHOICES):
        chosen = tl.load(ids_ptr + token.to(tl.int64) * TOP_K + k, mask=counted, other=-1)
        total += tl.sum((expert[None, :] == chosen[:, None]).to(tl.int32), axis=0)
    # Integers: the sum is the same in any order.
    tl.atomic_add(counts_ptr + expert, total, mask=(expert < num_experts) & (total > 0))
    tl.atomic_add(counts_ptr + num_experts, tl.sum(counted.to(tl.int32), axis=0))


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
    TOPS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Writes the gradient in the logits of some tokens."""
    SIGMOID: tl.constexpr = MODE == "sigmoid" or MODE == "sigmoid_renorm"
    expert = tl.arange(0, EXPERTS)
    exists = expert < num_experts
    top = tl.arange(0, TOPS)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = token < num_tokens
    logits, counted = read_tokens(
        logits_ptr, mask_ptr, token, num_tokens, expert, num_experts, HAS_MASK, ACC
    )
    softmax, logsumexp = softmax_of(logits, exists)
    total = tl.maximum(tl.load(counts_ptr + num_experts), 1).to(ACC)
    fraction = tl.load(counts_ptr + expert, mask=exists, other=0).to(ACC) / (total * CHOICES)
    grad_probability = tl.load(grad_balancing_ptr) * num_experts * fraction / total
    grad_probability = tl.where(counted[:, None], grad_probability[None, :], 0)

    address = token.to(tl.int64)[:, None] * TOP_K + top[None, :]
    wanted = known[:, None] & (top < TOP_K)[None, :]
    ids = tl.load(ids_ptr + address, mask=wanted, other=-1)
    grad_scores = tl.load(grad_scores_ptr + address, mask=wanted, other=0) * SCALE
    if SIGMOID:
        share, share_total = sigmoid_of(logits, exists)
        inner = tl.sum(grad_probability * share, axis=1) / share_total
        grad = (grad_probability - inner[:, None]) / share_total[:, None]
        if MODE == "sigmoid_renorm":
            chosen = gather_chosen(share, expert, ids, top, TOP_K)
            chosen_total = tl.sum(chosen, axis=1) + TINY
            inner = tl.sum(grad_scores * chosen, axis=1) / chosen_total
            grad_scores = (grad_scores - inner[:, None]) / chosen_total[:, None]
        grad += scatter_chosen(grad_scores, expert, ids, top, TOP_K)
        grad = grad * share * (1 - share)
    else:
        if MODE == "softmax_topk":
            grad_probability += scatter_chosen(grad_scores, expert, ids, top, TOP_K)
        inner = tl.sum(grad_probability * softmax, axis=1)
        grad = softmax * (grad_probability - inner[:, None])
        if MODE != "softmax_topk":
            chosen = gather_chosen(logits, expert, ids, top, TOP_K)
            scores, _ = softmax_of(chosen, top < TOP_K)
            inner = tl.sum(grad_scores * scores, axis=1)
            grad_scores = scores * (grad_scores - inner[:, None])
            grad += scatter_chosen(grad_scores, expert, ids, top, TOP_K)
    slope = 2 * logsumexp * (tl.load(grad_z_ptr) / total)
    grad += softmax * tl.where(counted, slope, 0)[:, None]
    address = token.to(tl.int64)[:, None] * num_experts + expert[None, :]
    out = grad.to(grad_logits_ptr.dtype.element_ty)
    tl.store(grad_logits_ptr + address, out, mask=known[:, None] & exists[None, :])


@triton.jit
def gather_chosen(value, expert, ids, top, TOP_K: tl.constexpr):
    """Returns `[tokens, tops]`, the values of the chosen experts."""
    chosen = tl.zeros(ids.shape, dtype=value.dtype)
    for k in range(TOP_K):
        own = tl.sum(tl.where((top == k)[None, :], ids, 0), axis=1)
        chosen = tl.where((top == k)[None, :], pick(value, expert, own)[:, None], chosen)
    return chosen


@triton.jit
def scatter_chosen(value, expert, ids, top, TOP_K: tl.constexpr):
    """Returns `[tokens, experts]`, the values at the chosen experts and zeros."""
    spread = tl.zeros((value.shape[0], expert.shape[0]), dtype=value.dtype)
    for k in range(TOP_K):
        own = tl.sum(tl.where((top == k)[None, :], ids, 0), axis=1)
        part = tl.sum(tl.where((top == k)[None, :], value, 0), axis=1)
        spread += tl.where(expert[None, :] == own[:, None], part[:, None], 0)
    return spread


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
    """Returns the gradient in contiguous logits."""
    num_tokens, num_experts = logits.shape
    grad_logits = logits.new_empty(logits.shape)
    if num_tokens == 0:
        return grad_logits
    top_k = ids.shape[1]
    experts, block, num_warps = program_shape(num_experts, logits.dtype)
    count_block = max(1, min(64, COUNT_ELEMENTS // experts))
    counts = ids.new_zeros(num_experts + 1)
    choices = top_k if balance == "all" else 1
    with torch.cuda.device_of(logits):
        count_choices_kernel[(triton.cdiv(num_tokens, count_block),)](
            ids,
            token_mask,
            counts,
            num_tokens,
            num_experts,
            TOP_K=top_k,
            CHOICES=choices,
            HAS_MASK=token_mask is not None,
            EXPERTS=experts,
            BLOCK=count_block,
        )
        topk_router_backward_kernel[(triton.cdiv(num_tokens, block),)](
            grad_scores,
            grad_balancing,
            grad_z,
            logits,
            ids,
            token_mask,
            counts,
            grad_logits,
            num_tokens,
            num_experts,
            TOP_K=top_k,
            MODE=mode,
            CHOICES=choices,
            SCALE=scale,
            HAS_MASK=token_mask is not None,
            TOPS=triton.next_power_of_2(top_k),
            EXPERTS=experts,
            BLOCK=block,
            ACC=accumulator(logits.dtype),
            num_warps=num_warps,
        )
    return grad_logits
