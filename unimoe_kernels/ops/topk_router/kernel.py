"""Triton kernels of `topk_router` and its gradient: a few tokens a step, all their experts at once.

The best K are found in K rounds of a maximum over keys that hold a value's order and, below it, how
low its id is: the choice is exact, and among equals the lower id wins. Counts and sums for the
losses are kept by each program and added up in order by a kernel of one program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unimoe_kernels._triton.activation import sigmoid
from unimoe_kernels._triton.launch import accumulator, device_of

# Keeps renormalised sigmoid scores finite when all of them underflow, as DeepSeek-V3 does.
TINY = tl.constexpr(1e-20)
NOTHING = tl.constexpr(-(2**63))  # below the key of every value
BLOCK_ELEMENTS = 2048  # logits that a program holds: 16 a thread, not tuned on a GPU
REDUCE_ELEMENTS = 2048
COUNT_BLOCK = 64


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
    experts, block, num_warps = _shape(num_experts, logits.dtype)
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
    experts, block, num_warps = _shape(num_experts, logits.dtype)
    counts = ids.new_zeros(num_experts + 1)
    choices = top_k if balance == "all" else 1
    with torch.cuda.device_of(logits):
        count_choices_kernel[(triton.cdiv(num_tokens, COUNT_BLOCK),)](
            ids,
            token_mask,
            counts,
            num_tokens,
            num_experts,
            TOP_K=top_k,
            CHOICES=choices,
            HAS_MASK=token_mask is not None,
            EXPERTS=experts,
            BLOCK=COUNT_BLOCK,
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


def _shape(num_experts: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Returns the experts as a power of 2, and the tokens and warps of a program."""
    experts = triton.next_power_of_2(num_experts)
    block = max(1, min(64, BLOCK_ELEMENTS // experts))
    words = experts * block * (2 if dtype == torch.float64 else 1)
    return experts, block, max(4, min(16, words // 512))
