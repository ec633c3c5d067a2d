"""Triton kernels of `topk_router`: a few tokens a step, all their experts at once.

The best K are found in K rounds of a maximum over keys that hold a value's order and, below it, how
low its id is: the choice is exact, and among equals the lower id wins. Counts and sums for the
losses are kept by each program and added up in order by a kernel of one program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unimoe_kernels._triton.launch import accumulator, device_of
from unimoe_kernels._triton.router import (
    TINY,
    close_groups,
    keys_of,
    pick,
    program_shape,
    read_tokens,
    sigmoid_of,
    softmax_of,
    take_best,
)

REDUCE_ELEMENTS = 2048


@triton.jit(do_not_specialize=["num_tokens"])
def topk_router_kernel(
    logits_ptr,
    bias_ptr,
    mask_ptr,
    scores_ptr,
    ids_ptr,
    chosen_ptr,
    counted_ptr,
    probability_ptr,
    sums_ptr,
    num_tokens,
    num_experts,
    TOP_K: tl.constexpr,
    MODE: tl.constexpr,
    CHOICES: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BEST: tl.constexpr,
    TOPS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Writes scores and ids, and for the losses counts and sums of this program's tokens."""
    SIGMOID: tl.constexpr = MODE == "sigmoid" or MODE == "sigmoid_renorm"
    expert = tl.arange(0, EXPERTS)
    exists = expert < num_experts
    top = tl.arange(0, TOPS)
    chosen_total = tl.zeros((EXPERTS,), dtype=tl.int32)
    counted_total = tl.zeros((EXPERTS,), dtype=tl.int32)
    probability_total = tl.zeros((EXPERTS,), dtype=ACC)
    square_total = tl.zeros((BLOCK,), dtype=ACC)
    token_total = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(tl.program_id(0) * BLOCK, num_tokens, tl.num_programs(0) * BLOCK):
        token = first + tl.arange(0, BLOCK)
        known = token < num_tokens
        logits, counted = read_tokens(
            logits_ptr, mask_ptr, token, num_tokens, expert, num_experts, HAS_MASK, ACC
        )
        softmax, logsumexp = softmax_of(logits, exists)
        choice = logits
        if SIGMOID:
            share, share_total = sigmoid_of(logits, exists)
            choice = share
        if HAS_BIAS:
            bias = tl.load(bias_ptr + expert, mask=exists, other=0).to(ACC)
            choice = (share if SIGMOID else softmax) + bias[None, :]
        if NUM_GROUPS != TOP_GROUPS:
            choice = close_groups(
                choice,
                expert,
                num_experts,
                NUM_GROUPS,
                TOP_GROUPS,
                GROUPS,
                GROUP_SIZE,
                BEST,
                WIDE,
            )
        keys = keys_of(choice, exists, WIDE)
        ids = tl.zeros((BLOCK, TOPS), dtype=tl.int32)
        scores = tl.full((BLOCK, TOPS), 0, dtype=ACC)
        for k in range(TOP_K):
            chosen, keys = take_best(keys, expert, WIDE)
            if SIGMOID:
                value = pick(share, expert, chosen)
            elif MODE == "softmax_topk":
                value = pick(softmax, expert, chosen)
            else:
                value = pick(logits, expert, chosen)
            ids = tl.where((top == k)[None, :], chosen[:, None], ids)
            scores = tl.where((top == k)[None, :], value[:, None], scores)
            hit = (expert[None, :] == chosen[:, None]) & known[:, None]
            chosen_total += tl.sum(hit.to(tl.int32), axis=0)
            if CHOICES > 1 or k == 0:
                counted_total += tl.sum((hit & counted[:, None]).to(tl.int32), axis=0)
        if MODE == "sigmoid_renorm":
            scores = scores / (tl.sum(scores, axis=1) + TINY)[:, None]
        elif MODE == "topk_softmax" or MODE == "softmax_topk_renorm":
            # The softmax over all, renormalised over the chosen, is the softmax over these.
            scores, _ = softmax_of(scores, top < TOP_K)
        address = token.to(tl.int64)[:, None] * TOP_K + top[None, :]
        wanted = known[:, None] & (top < TOP_K)[None, :]
        tl.store(ids_ptr + address, ids, mask=wanted)
        tl.store(scores_ptr + address, scores * SCALE, mask=wanted)
        probability = share / share_total[:, None] if SIGMOID else softmax
        # Tokens that do not count may be NaN.
        probability = tl.where(counted[:, None], probability, 0)
        probability_total += tl.sum(probability, axis=0)
        square_total += tl.where(counted, logsumexp * logsumexp, 0)
        token_total += counted.to(tl.int32)
    address = tl.program_id(0).to(tl.int64) * num_experts + expert
    tl.store(chosen_ptr + address, chosen_total, mask=exists)
    tl.store(counted_ptr + address, counted_total, mask=exists)
    tl.store(probability_ptr + address, probability_total, mask=exists)
    tl.store(sums_ptr + 2 * tl.program_id(0), tl.sum(square_total, axis=0))
    tl.store(sums_ptr + 2 * tl.program_id(0) + 1, tl.sum(token_total, axis=0).to(ACC))


@triton.jit(do_not_specialize=["num_parts"])
def reduce_kernel(
    chosen_ptr,
    counted_ptr,
    probability_ptr,
    sums_ptr,
    tokens_per_expert_ptr,
    balancing_ptr,
    z_ptr,
    num_parts,
    num_experts,
    CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Adds up what the programs counted and summed, in float64, and writes the losses."""
    expert = tl.arange(0, EXPERTS)
    exists = expert < num_experts
    chosen = tl.zeros((EXPERTS,), dtype=tl.int32)
    counted = tl.zeros((EXPERTS,), dtype=tl.int32)
    probability = tl.zeros((EXPERTS,), dtype=tl.float64)
    square = tl.zeros((BLOCK,), dtype=tl.float64)
    tokens = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(0, num_parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        known = part < num_parts
        address = part[:, None] * num_experts + expert[None, :]
        mask = known[:, None] & exists[None, :]
        chosen += tl.sum(tl.load(chosen_ptr + address, mask=mask, other=0), axis=0)
        counted += tl.sum(tl.load(counted_ptr + address, mask=mask, other=0), axis=0)
        sums = tl.load(probability_ptr + address, mask=mask, other=0)
        probability += tl.sum(sums.to(tl.float64), axis=0)
        square += tl.load(sums_ptr + 2 * part, mask=known, other=0).to(tl.float64)
        tokens += tl.load(sums_ptr + 2 * part + 1, mask=known, other=0).to(tl.float64)
    total = tl.maximum(tl.sum(tokens, axis=0), 1)
    tl.store(tokens_per_expert_ptr + expert, chosen, mask=exists)
    shares = counted.to(tl.float64) / (total * CHOICES) * (probability / total)
    tl.store(balancing_ptr, (tl.sum(shares, axis=0) * num_experts).to(ACC))
    tl.store(z_ptr, (tl.sum(square, axis=0) / total).to(ACC))


def topk_router(
    logits: Tensor,
    correction_bias: Tensor | None,
    token_mask: Tensor | None,
    top_k: int,
    mode: str,
    num_groups: int,
    top_groups: int,
    scale: float,
    balance: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Routes contiguous logits; see `ops/topk_router/op.py`."""
    num_tokens, num_experts = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scores = logits.new_empty(num_tokens, top_k, dtype=dtype)
    ids = logits.new_empty(num_tokens, top_k, dtype=torch.int32)
    tokens_per_expert = logits.new_empty(num_experts, dtype=torch.int32)
    balancing, z = (logits.new_empty((), dtype=dtype) for _ in range(2))
    experts, block, num_warps = program_shape(num_experts, logits.dtype)
    num_parts = max(1, min(triton.cdiv(num_tokens, block), device_of(logits).processors))
    chosen, counted = (
        logits.new_empty(num_parts, num_experts, dtype=torch.int32) for _ in range(2)
    )
    probability = logits.new_empty(num_parts, num_experts, dtype=dtype)
    sums = logits.new_empty(num_parts, 2, dtype=dtype)
    choices = top_k if balance == "all" else 1
    group_size = num_experts // num_groups
    with torch.cuda.device_of(logits):
        topk_router_kernel[(num_parts,)](
            logits,
            correction_bias,
            token_mask,
            scores,
            ids,
            chosen,
            counted,
            probability,
            sums,
            num_tokens,
            num_experts,
            TOP_K=top_k,
            MODE=mode,
            CHOICES=choices,
            SCALE=scale,
            HAS_BIAS=correction_bias is not None,
            HAS_MASK=token_mask is not None,
            NUM_GROUPS=num_groups,
            TOP_GROUPS=top_groups,
            GROUPS=triton.next_power_of_2(num_groups),
            GROUP_SIZE=group_size,
            # DeepSeek-V2 ranks groups by their best expert; V3, which has the bias, by two.
            BEST=1 if correction_bias is None else min(2, group_size),
            TOPS=triton.next_power_of_2(top_k),
            EXPERTS=experts,
            BLOCK=block,
            ACC=accumulator(logits.dtype),
            WIDE=logits.dtype == torch.float64,
            num_warps=num_warps,
        )
        reduce_kernel[(1,)](
            chosen,
            counted,
            probability,
            sums,
            tokens_per_expert,
            balancing,
            z,
            num_parts,
            num_experts,
            CHOICES=choices,
            EXPERTS=experts,
            BLOCK=max(1, REDUCE_ELEMENTS // experts),
            ACC=accumulator(logits.dtype),
            num_warps=num_warps,
        )
    return scores, ids, tokens_per_expert, balancing, z
