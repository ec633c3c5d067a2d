"""Tokens of the router and the exact choice of the best, for `topk_router` and its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from unimoe_kernels._triton.activation import sigmoid

# Keeps renormalised sigmoid scores finite when all of them underflow, as DeepSeek-V3 does.
TINY = tl.constexpr(1e-20)
NOTHING = tl.constexpr(-(2**63))  # below the key of every value
BLOCK_ELEMENTS = 2048  # logits that a program holds: 16 a thread, not tuned on a GPU


@triton.jit
def order_of(value):
    """Returns integers in the order of the values: NaN above infinity, -0 equal to 0."""
    value = tl.where(value == 0, 0, value).to(value.dtype)
    if value.dtype == tl.float64:
        bits = value.to(tl.int64, bitcast=True)
        order = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
        return tl.where(value != value, 0x7FFFFFFFFFFFFFFF, order)
    else:
        bits = value.to(tl.int32, bitcast=True)
        order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        return tl.where(value != value, 0x7FFFFFFF, order).to(tl.int64)


@triton.jit
def keys_of(value, exists, WIDE: tl.constexpr):
    """Returns keys of `[tokens, candidates]` whose maximum is the best candidate.

    The order of a float64 fills a key, so that its ties are settled by `take_best`.
    """
    order = order_of(value)
    if not WIDE:
        lowness = 0x7FFFFFFF - tl.arange(0, value.shape[1])
        order = (order << 32) | lowness.to(tl.int64)[None, :]
    return tl.where(exists[None, :], order, NOTHING)


@triton.jit
def take_best(keys, candidate, WIDE: tl.constexpr):
    """Returns the best candidate of each token, and the keys without it."""
    best = tl.max(keys, axis=1)
    if WIDE:
        tied = tl.where(keys == best[:, None], candidate[None, :], 0x7FFFFFFF)
        chosen = tl.min(tied, axis=1)
    else:
        chosen = (0x7FFFFFFF - (best & 0x7FFFFFFF)).to(tl.int32)
    return chosen, tl.where(candidate[None, :] == chosen[:, None], NOTHING, keys)


@triton.jit
def pick(value, candidate, chosen):
    """Returns the value of the chosen candidate of each token."""
    return tl.sum(tl.where(candidate[None, :] == chosen[:, None], value, 0), axis=1)


@triton.jit
def close_groups(
    choice,
    expert,
    num_experts,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BEST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Returns the choice with `-inf` in all but the best groups of each token."""
    group = tl.arange(0, GROUPS)
    group_of_expert = expert // GROUP_SIZE
    rank = tl.zeros((choice.shape[0], GROUPS), dtype=choice.dtype)
    for g in range(NUM_GROUPS):
        keys = keys_of(choice, (group_of_expert == g) & (expert < num_experts), WIDE)
        chosen, keys = take_best(keys, expert, WIDE)
        value = pick(choice, expert, chosen)
        if BEST == 2:
            chosen, keys = take_best(keys, expert, WIDE)
            value += pick(choice, expert, chosen)
        rank = tl.where((group == g)[None, :], value[:, None], rank)
    keys = keys_of(rank, group < NUM_GROUPS, WIDE)
    closed = tl.full(choice.shape, 1, dtype=tl.int1)
    for _ in range(TOP_GROUPS):
        chosen, keys = take_best(keys, group, WIDE)
        closed = closed & (group_of_expert[None, :] != chosen[:, None])
    return tl.where(closed, float("-inf"), choice)


@triton.jit
def read_tokens(logits_ptr, mask_ptr, token, num_tokens, expert, num_experts, HAS_MASK, ACC):
    """Returns logits `[tokens, experts]`, 0 where there are none, and which tokens count."""
    known = (token < num_tokens)[:, None] & (expert < num_experts)[None, :]
    address = token.to(tl.int64)[:, None] * num_experts + expert[None, :]
    logits = tl.load(logits_ptr + address, mask=known, other=0).to(ACC)
    counted = token < num_tokens
    if HAS_MASK:
        counted = tl.load(mask_ptr + token, mask=counted, other=0).to(tl.int1)
    return logits, counted


@triton.jit
def softmax_of(logits, exists):
    """Returns the softmax over the experts that exist, and its logarithm's denominator."""
    # A comparison alone would let a NaN pass for -inf.
    largest = tl.max(tl.where(exists[None, :], logits, float("-inf")), axis=1)
    power = tl.where(exists[None, :], tl.exp(logits - largest[:, None]), 0)
    total = tl.sum(power, axis=1)
    return power / total[:, None], largest + tl.log(total)


@triton.jit
def sigmoid_of(logits, exists):
    """Returns the sigmoid of the experts that exist and its sum."""
    share = tl.where(exists[None, :], sigmoid(logits), 0)
    return share, tl.sum(share, axis=1) + TINY


def program_shape(num_experts: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Returns the experts as a power of 2, and the tokens and warps of a program."""
    experts = triton.next_power_of_2(num_experts)
    block = max(1, min(64, BLOCK_ELEMENTS // experts))
    words = experts * block * (2 if dtype == torch.float64 else 1)
    return experts, block, max(4, min(16, words // 512))
