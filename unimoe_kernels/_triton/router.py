"""Loads of router logits and exact top-k selection, for `topk_router` and its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from unimoe_kernels._triton.activation import sigmoid

# As in DeepSeek-V3, keeps renormalised sigmoid scores finite when all of them underflow.
TINY = tl.constexpr(1e-20)
NOTHING = tl.constexpr(-(2**63))  # below the key of every value
BLOCK_ELEMENTS = 2048  # logits of a program: 16 a thread, not tuned on a GPU


@triton.jit
def order_of(value_TE):
    """Returns integers that sort like the values, with NaN above infinity and -0 equal to 0."""
    value_TE = tl.where(value_TE == 0, 0, value_TE).to(value_TE.dtype)
    if value_TE.dtype == tl.float64:
        bits_TE = value_TE.to(tl.int64, bitcast=True)
        order_TE = bits_TE ^ ((bits_TE >> 63) & 0x7FFFFFFFFFFFFFFF)
        return tl.where(value_TE != value_TE, 0x7FFFFFFFFFFFFFFF, order_TE)
    else:
        bits_TE = value_TE.to(tl.int32, bitcast=True)
        order_TE = bits_TE ^ ((bits_TE >> 31) & 0x7FFFFFFF)
        return tl.where(value_TE != value_TE, 0x7FFFFFFF, order_TE).to(tl.int64)


@triton.jit
def keys_of(value_TE, mask_e, WIDE: tl.constexpr):
    """Returns keys of `[tokens, candidates]` whose maximum is the best candidate.

    Ties go to the lower index, which is part of the key. A float64 (`WIDE`) fills the whole key, so
    `take_best` breaks its ties.
    """
    order_TE = order_of(value_TE)
    if not WIDE:
        lowness_E = 0x7FFFFFFF - tl.arange(0, value_TE.shape[1])
        order_TE = (order_TE << 32) | lowness_E.to(tl.int64)[None, :]
    return tl.where(mask_e[None, :], order_TE, NOTHING)


@triton.jit
def take_best(keys_TE, offs_e, WIDE: tl.constexpr):
    """Returns the best candidate of each token, and the keys with it removed."""
    best_T = tl.max(keys_TE, axis=1)
    if WIDE:
        tied_TE = tl.where(keys_TE == best_T[:, None], offs_e[None, :], 0x7FFFFFFF)
        chosen_T = tl.min(tied_TE, axis=1)
    else:
        chosen_T = (0x7FFFFFFF - (best_T & 0x7FFFFFFF)).to(tl.int32)
    return chosen_T, tl.where(offs_e[None, :] == chosen_T[:, None], NOTHING, keys_TE)


@triton.jit
def pick(value_TE, offs_e, chosen_T):
    """Returns the value of the chosen candidate of each token."""
    return tl.sum(tl.where(offs_e[None, :] == chosen_T[:, None], value_TE, 0), axis=1)


@triton.jit
def close_groups(
    choice_TE,
    offs_e,
    num_experts,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BEST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Returns the selection scores with `-inf` outside the best groups of each token."""
    offs_g = tl.arange(0, BLOCK_G)
    group_E = offs_e // GROUP_SIZE
    rank_TG = tl.zeros((choice_TE.shape[0], BLOCK_G), dtype=choice_TE.dtype)
    for g in range(NUM_GROUPS):
        keys_TE = keys_of(choice_TE, (group_E == g) & (offs_e < num_experts), WIDE)
        chosen_T, keys_TE = take_best(keys_TE, offs_e, WIDE)
        value_T = pick(choice_TE, offs_e, chosen_T)
        if BEST == 2:
            chosen_T, keys_TE = take_best(keys_TE, offs_e, WIDE)
            value_T += pick(choice_TE, offs_e, chosen_T)
        rank_TG = tl.where((offs_g == g)[None, :], value_T[:, None], rank_TG)
    keys_TE = keys_of(rank_TG, offs_g < NUM_GROUPS, WIDE)
    closed_TE = tl.full(choice_TE.shape, 1, dtype=tl.int1)
    for _ in range(TOP_GROUPS):
        chosen_T, keys_TE = take_best(keys_TE, offs_g, WIDE)
        closed_TE = closed_TE & (group_E[None, :] != chosen_T[:, None])
    return tl.where(closed_TE, float("-inf"), choice_TE)


@triton.jit
def counted_tokens(mask_ptr, offs_t, num_tokens, HAS_MASK: tl.constexpr):
    """Returns which tokens count in the losses: those in bounds and selected by the mask."""
    counted_T = offs_t < num_tokens
    if HAS_MASK:
        counted_T = tl.load(mask_ptr + offs_t, mask=counted_T, other=0).to(tl.int1)
    return counted_T


@triton.jit
def read_tokens(logits_ptr, mask_ptr, offs_t, num_tokens, offs_e, num_experts, HAS_MASK, ACC):
    """Returns logits `[tokens, experts]`, 0 out of bounds, and which tokens count."""
    mask_te = (offs_t < num_tokens)[:, None] & (offs_e < num_experts)[None, :]
    logits_offs_te = offs_t.to(tl.int64)[:, None] * num_experts + offs_e[None, :]
    logits_TE = tl.load(logits_ptr + logits_offs_te, mask=mask_te, other=0).to(ACC)
    return logits_TE, counted_tokens(mask_ptr, offs_t, num_tokens, HAS_MASK)


@triton.jit
def softmax_of(logits_TE, mask_e):
    """Returns the softmax over the experts in bounds, and the logsumexp of their logits."""
    # Masking after the exponential too: a NaN maximum would make masked entries NaN.
    largest_T = tl.max(tl.where(mask_e[None, :], logits_TE, float("-inf")), axis=1)
    power_TE = tl.where(mask_e[None, :], tl.exp(logits_TE - largest_T[:, None]), 0)
    sum_T = tl.sum(power_TE, axis=1)
    return power_TE / sum_T[:, None], largest_T + tl.log(sum_T)


@triton.jit
def sigmoid_of(logits_TE, mask_e):
    """Returns the sigmoid of the experts in bounds, 0 elsewhere, and its sum."""
    share_TE = tl.where(mask_e[None, :], sigmoid(logits_TE), 0)
    return share_TE, tl.sum(share_TE, axis=1) + TINY


def program_shape(num_experts: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Returns the experts rounded up to a power of 2, and the tokens and warps of a program."""
    block_e = triton.next_power_of_2(num_experts)
    block_t = max(1, min(64, BLOCK_ELEMENTS // block_e))
    words = block_e * block_t * (2 if dtype == torch.float64 else 1)
    return block_e, block_t, max(4, min(16, words // 512))
