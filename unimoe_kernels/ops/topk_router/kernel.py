"""Triton kernels of `topk_router`: a few tokens per step, all their experts at once.

The top K are found in K rounds of a maximum over keys whose high bits order the values and whose
low bits order the ids: the choice is exact, and ties go to the lower id. Each program accumulates
counts and sums for the losses, which a kernel of one program adds up in order.
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
# A multiprocessor runs one program per STEPS_PER_PROGRAM of its steps, up to a maximum: several
# programs hide one another's latency, but a single program adds up the counts of all. Not tuned on
# a GPU.
STEPS_PER_PROGRAM = 4
MAX_PROGRAMS_PER_PROCESSOR = 4


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
    BLOCK_G: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BEST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Writes scores and ids, and the program's counts and sums for the losses."""
    SIGMOID: tl.constexpr = MODE == "sigmoid" or MODE == "sigmoid_renorm"
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < num_experts
    offs_k = tl.arange(0, BLOCK_K)
    chosen_E = tl.zeros((BLOCK_E,), dtype=tl.int32)
    counted_E = tl.zeros((BLOCK_E,), dtype=tl.int32)
    probability_E = tl.zeros((BLOCK_E,), dtype=ACC)
    square_T = tl.zeros((BLOCK_T,), dtype=ACC)
    tokens_T = tl.zeros((BLOCK_T,), dtype=tl.int32)
    for start_t in range(tl.program_id(0) * BLOCK_T, num_tokens, tl.num_programs(0) * BLOCK_T):
        offs_t = start_t + tl.arange(0, BLOCK_T)
        mask_t = offs_t < num_tokens
        logits_TE, counted_T = read_tokens(
            logits_ptr, mask_ptr, offs_t, num_tokens, offs_e, num_experts, HAS_MASK, ACC
        )
        softmax_TE, logsumexp_T = softmax_of(logits_TE, mask_e)
        choice_TE = logits_TE
        if SIGMOID:
            share_TE, share_sum_T = sigmoid_of(logits_TE, mask_e)
            choice_TE = share_TE
        if HAS_BIAS:
            bias_E = tl.load(bias_ptr + offs_e, mask=mask_e, other=0).to(ACC)
            choice_TE = (share_TE if SIGMOID else softmax_TE) + bias_E[None, :]
        if NUM_GROUPS != TOP_GROUPS:
            choice_TE = close_groups(
                choice_TE,
                offs_e,
                num_experts,
                NUM_GROUPS,
                TOP_GROUPS,
                BLOCK_G,
                GROUP_SIZE,
                BEST,
                WIDE,
            )
        keys_TE = keys_of(choice_TE, mask_e, WIDE)
        ids_TK = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.int32)
        scores_TK = tl.full((BLOCK_T, BLOCK_K), 0, dtype=ACC)
        for k in range(TOP_K):
            chosen_T, keys_TE = take_best(keys_TE, offs_e, WIDE)
            if SIGMOID:
                value_T = pick(share_TE, offs_e, chosen_T)
            elif MODE == "softmax_topk":
                value_T = pick(softmax_TE, offs_e, chosen_T)
            else:
                value_T = pick(logits_TE, offs_e, chosen_T)
            ids_TK = tl.where((offs_k == k)[None, :], chosen_T[:, None], ids_TK)
            scores_TK = tl.where((offs_k == k)[None, :], value_T[:, None], scores_TK)
            hit_TE = (offs_e[None, :] == chosen_T[:, None]) & mask_t[:, None]
            chosen_E += tl.sum(hit_TE.to(tl.int32), axis=0)
            if CHOICES > 1 or k == 0:
                counted_E += tl.sum((hit_TE & counted_T[:, None]).to(tl.int32), axis=0)
        if MODE == "sigmoid_renorm":
            scores_TK = scores_TK / (tl.sum(scores_TK, axis=1) + TINY)[:, None]
        elif MODE == "topk_softmax" or MODE == "softmax_topk_renorm":
            # The softmax over all experts, renormalised over the chosen, is that over the chosen.
            scores_TK, _ = softmax_of(scores_TK, offs_k < TOP_K)
        choices_offs_tk = offs_t.to(tl.int64)[:, None] * TOP_K + offs_k[None, :]
        mask_tk = mask_t[:, None] & (offs_k < TOP_K)[None, :]
        tl.store(ids_ptr + choices_offs_tk, ids_TK, mask=mask_tk)
        tl.store(scores_ptr + choices_offs_tk, scores_TK * SCALE, mask=mask_tk)
        probability_TE = share_TE / share_sum_T[:, None] if SIGMOID else softmax_TE
        # Tokens that are masked out of the losses may be NaN.
        probability_TE = tl.where(counted_T[:, None], probability_TE, 0)
        probability_E += tl.sum(probability_TE, axis=0)
        square_T += tl.where(counted_T, logsumexp_T * logsumexp_T, 0)
        tokens_T += counted_T.to(tl.int32)
    parts_offs_e = tl.program_id(0).to(tl.int64) * num_experts + offs_e
    tl.store(chosen_ptr + parts_offs_e, chosen_E, mask=mask_e)
    tl.store(counted_ptr + parts_offs_e, counted_E, mask=mask_e)
    tl.store(probability_ptr + parts_offs_e, probability_E, mask=mask_e)
    tl.store(sums_ptr + 2 * tl.program_id(0), tl.sum(square_T, axis=0))
    tl.store(sums_ptr + 2 * tl.program_id(0) + 1, tl.sum(tokens_T, axis=0).to(ACC))


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
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """Adds up the counts and sums of all programs, in float64, and writes the losses."""
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < num_experts
    chosen_E = tl.zeros((BLOCK_E,), dtype=tl.int32)
    counted_E = tl.zeros((BLOCK_E,), dtype=tl.int32)
    probability_E = tl.zeros((BLOCK_E,), dtype=tl.float64)
    square_C = tl.zeros((BLOCK_C,), dtype=tl.float64)
    tokens_C = tl.zeros((BLOCK_C,), dtype=tl.float64)
    for start_c in range(0, num_parts, BLOCK_C):
        offs_c = start_c + tl.arange(0, BLOCK_C)
        mask_c = offs_c < num_parts
        parts_offs_ce = offs_c[:, None] * num_experts + offs_e[None, :]
        mask_ce = mask_c[:, None] & mask_e[None, :]
        chosen_E += tl.sum(tl.load(chosen_ptr + parts_offs_ce, mask=mask_ce, other=0), axis=0)
        counted_E += tl.sum(tl.load(counted_ptr + parts_offs_ce, mask=mask_ce, other=0), axis=0)
        probability_CE = tl.load(probability_ptr + parts_offs_ce, mask=mask_ce, other=0)
        probability_E += tl.sum(probability_CE.to(tl.float64), axis=0)
        square_C += tl.load(sums_ptr + 2 * offs_c, mask=mask_c, other=0).to(tl.float64)
        tokens_C += tl.load(sums_ptr + 2 * offs_c + 1, mask=mask_c, other=0).to(tl.float64)
    total = tl.maximum(tl.sum(tokens_C, axis=0), 1)
    tl.store(tokens_per_expert_ptr + offs_e, chosen_E, mask=mask_e)
    shares_E = counted_E.to(tl.float64) / (total * CHOICES) * (probability_E / total)
    tl.store(balancing_ptr, (tl.sum(shares_E, axis=0) * num_experts).to(ACC))
    tl.store(z_ptr, (tl.sum(square_C, axis=0) / total).to(ACC))


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
    route, reduce, num_parts = _launches(
        place_of(logits),
        (num_tokens, num_experts),
        logits.dtype,
        top_k,
        mode,
        (num_groups, top_groups),
        scale,
        balance,
        correction_bias is not None,
        token_mask is not None,
    )
    chosen, counted = (
        logits.new_empty(num_parts, num_experts, dtype=torch.int32) for _ in range(2)
    )
    probability = logits.new_empty(num_parts, num_experts, dtype=dtype)
    sums = logits.new_empty(num_parts, 2, dtype=dtype)
    route(logits, correction_bias, token_mask, scores, ids, chosen, counted, probability, sums)
    reduce(chosen, counted, probability, sums, tokens_per_expert, balancing, z)
    return scores, ids, tokens_per_expert, balancing, z


@planned
def _launches(
    place: Place,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    top_k: int,
    mode: str,
    groups: tuple[int, int],
    scale: float,
    balance: str,
    has_bias: bool,
    has_mask: bool,
) -> tuple[Launch, Launch, int]:
    (num_tokens, num_experts), (num_groups, top_groups) = sizes, groups
    block_e, block_t, num_warps = program_shape(num_experts, dtype)
    num_steps, processors = triton.cdiv(num_tokens, block_t), place.gpu.processors
    programs = num_steps // (processors * STEPS_PER_PROGRAM)
    programs = max(1, min(programs, MAX_PROGRAMS_PER_PROCESSOR))
    num_parts = max(1, min(num_steps, programs * processors))
    group_size = num_experts // num_groups
    common = {
        "CHOICES": top_k if balance == "all" else 1,
        "BLOCK_E": block_e,
        "ACC": accumulator(dtype),
        "num_warps": num_warps,
    }
    route = Launch(
        place,
        topk_router_kernel,
        (num_parts,),
        sizes,
        {
            "TOP_K": top_k,
            "MODE": mode,
            "SCALE": scale,
            "HAS_BIAS": has_bias,
            "HAS_MASK": has_mask,
            "NUM_GROUPS": num_groups,
            "TOP_GROUPS": top_groups,
            "BLOCK_G": triton.next_power_of_2(num_groups),
            "GROUP_SIZE": group_size,
            # DeepSeek-V2 ranks groups by their best expert; V3, which has a bias, by the best two.
            "BEST": min(2, group_size) if has_bias else 1,
            "BLOCK_K": triton.next_power_of_2(top_k),
            "BLOCK_T": block_t,
            "WIDE": dtype == torch.float64,
            **common,
        },
    )
    block_c = max(1, REDUCE_ELEMENTS // block_e)
    reduce = Launch(
        place, reduce_kernel, (1,), (num_parts, num_experts), {"BLOCK_C": block_c, **common}
    )
    return route, reduce, num_parts
