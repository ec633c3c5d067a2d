"""Calls of every Triton launcher on tensors without data, at the shapes of published models."""

import itertools
from functools import partial
from typing import NamedTuple

import torch

from unimoe_kernels.ops.expert_sort import kernel as expert_sort
from unimoe_kernels.ops.grouped_lora import kernel as grouped_lora
from unimoe_kernels.ops.grouped_lora import kernel_backward as grouped_lora_backward
from unimoe_kernels.ops.grouped_mm import kernel as grouped_mm
from unimoe_kernels.ops.moe_mlp import fused
from unimoe_kernels.ops.permute import kernel as permute
from unimoe_kernels.ops.swiglu import kernel as swiglu
from unimoe_kernels.ops.swiglu.op import ACTIVATIONS
from unimoe_kernels.ops.topk_router import kernel as topk_router
from unimoe_kernels.ops.topk_router import kernel_backward as topk_router_backward
from unimoe_kernels.ops.topk_router.op import MODES
from unimoe_kernels.ops.unpermute import kernel as unpermute


class Shape(NamedTuple):
    name: str
    tokens: int
    width: int
    expert_width: int
    experts: int
    top_k: int
    dtype: torch.dtype


SHAPES = [
    Shape("mixtral", 4096, 4096, 14336, 8, 2, torch.bfloat16),
    Shape("qwen3-decode", 16, 2048, 768, 128, 8, torch.bfloat16),
    # No width divides a tile.
    Shape("odd", 500, 200, 300, 4, 2, torch.float16),
    Shape("fp32", 4096, 1024, 2816, 4, 2, torch.float32),
    Shape("qwen3", 4096, 2048, 768, 128, 8, torch.bfloat16),
    Shape("fp64", 64, 256, 512, 4, 2, torch.float64),
]
# Not a power of 2 where widths are odd, too; above 32 for types that tensor cores multiply.
RANKS = (16, 8, 5, 32, 64, 128)
FEW_RANKS = ((SHAPES[0], 16), (SHAPES[2], 5))


def cases(everything):
    """Yields (name, function that launches kernels): of each kind one, or everything."""
    first = SHAPES[0]
    for name in ACTIVATIONS if everything else ACTIVATIONS[:1]:
        yield name, lambda name=name: activate(first, name)
    for mode in MODES if everything else ("topk_softmax", "sigmoid_renorm"):
        yield mode, lambda mode=mode: route(mode, 128, 8, torch.bfloat16)
    if everything:
        yield "wide", lambda: route("sigmoid_renorm", 256, 8, torch.float64)
        yield "large", lambda: route("softmax_topk", 4000, 16, torch.float32)
    for shape in SHAPES if everything else SHAPES[:3]:
        if everything or shape is first:
            yield shape.name, lambda shape=shape: sort_and_copy(shape)
            yield shape.name, lambda shape=shape: multiply(shape)
        if everything or shape.name != "odd":
            yield shape.name, lambda shape=shape: layer(shape)
    for shape, rank in itertools.product(SHAPES, RANKS) if everything else FEW_RANKS:
        yield f"{shape.name}-r{rank}", lambda shape=shape, rank=rank: lora(shape, rank)
    # One token: the sums of an expert's rows are shared out by a launch of their own.
    yield "long", lambda: lora(first._replace(tokens=1), 64, frozen_x=False)
    if everything:
        yield from few_rows_and_long_sums(first)
        yield "tf32", with_tf32


def empty(*size, dtype):
    size = size[0] if size == ((),) else size
    return torch.empty(size, dtype=dtype, device="meta")


def ints(size):
    return empty(size, dtype=torch.int32)


def route(mode, num_experts, top_k, dtype):
    """Without bias and groups, then with both where the mode takes them."""
    tokens, wide = 4096, dtype == torch.float64
    logits = empty(tokens, num_experts, dtype=dtype)
    scores = empty(tokens, top_k, dtype=torch.float64 if wide else torch.float32)
    scalar = empty((), dtype=scores.dtype)
    ids, mask = empty(tokens, top_k, dtype=torch.int32), empty(tokens, dtype=torch.bool)
    bias = empty(num_experts, dtype=torch.float32)
    topk_router.topk_router(logits, None, None, top_k, mode, 1, 1, 1.0, "all")
    if mode != "topk_softmax":
        topk_router.topk_router(logits, bias, mask, top_k, mode, 8, 4, 2.5, "first")
    topk_router_backward.topk_router_backward(
        scores, scalar, scalar, logits, ids, mask, mode, 2.5, "first"
    )


def sort_and_copy(shape):
    rows = shape.tokens * shape.top_k
    ids, offsets = ints(rows), ints(shape.experts + 1)
    score = torch.float64 if shape.dtype == torch.float64 else torch.float32
    scores = empty(shape.tokens, shape.top_k, dtype=score)
    x = empty(shape.tokens, shape.width, dtype=shape.dtype)
    expert_sort.expert_sort(ids, shape.experts)
    expert_sort.expert_sort(ints(expert_sort.SMALL_ROWS), shape.experts)
    sorted_rows = permute.permute(x, ids, offsets, shape.top_k)
    unpermute.unpermute(sorted_rows, ids, offsets, scores, shape.top_k)
    unpermute.unpermute(sorted_rows, ids, offsets, None, shape.top_k)
    unpermute.unpermute_backward(x, sorted_rows, ids, offsets, scores, shape.top_k)


def with_tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        layer(SHAPES[3])
        lora(SHAPES[3], 16)
        lora(SHAPES[3], 64)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def activate(shape, name):
    x = empty(shape.tokens, 2 * shape.expert_width, dtype=shape.dtype)
    swiglu.swiglu_backward(swiglu.swiglu(x, name, 7.0, 1.702), x, name, 7.0, 1.702)


def multiply(shape):
    rows, dtype = shape.tokens * shape.top_k, shape.dtype
    offsets, order = ints(shape.experts + 1), ints(rows)
    x = empty(rows, shape.width, dtype=dtype)
    weight = empty(shape.experts, shape.expert_width, shape.width, dtype=dtype)
    bias = empty(shape.experts, shape.expert_width, dtype=dtype)
    y = grouped_mm.grouped_mm(x, weight, offsets, bias)
    grouped_mm.grouped_mm(y, weight.transpose(1, 2), offsets, None)
    grouped_mm.grouped_mm_wgrad(y, x, offsets, True)
    tokens = empty(shape.tokens, shape.width, dtype=dtype)
    grouped_mm.grouped_mm(tokens, weight, offsets, None, order, shape.top_k, tail=False)


def few_rows_and_long_sums(shape):
    """Yields cases of `lora` whose sums are shared out, besides those of one token."""
    some = shape._replace(tokens=256)
    for rank in (16, 64):
        yield f"long-r{rank}", lambda rank=rank: lora(some, rank, frozen_x=False)
    for name, dtype in (("fp32", torch.float32), ("fp64", torch.float64)):
        wide = shape._replace(tokens=16, dtype=dtype)
        yield f"{name}-long", lambda wide=wide: lora(wide, 32, frozen_x=False)


def lora(shape, rank, frozen_x=True):
    """A forward at the first projection, and its backward; `frozen_x` adds one without x's."""
    rows, dtype = shape.tokens * shape.top_k, shape.dtype
    x = empty(rows, shape.width, dtype=dtype)
    lora_A = empty(shape.experts, rank, shape.width, dtype=dtype)
    lora_B = empty(shape.experts, 2 * shape.expert_width, rank, dtype=dtype)
    if not grouped_lora.covers(x, lora_A, lora_B):
        return
    offsets = ints(shape.experts + 1)
    y, low = grouped_lora.grouped_lora(x, lora_A, lora_B, offsets, 0.5)
    turned = (lora_B.transpose(1, 2), lora_A.transpose(1, 2))
    _, grad_low = grouped_lora.grouped_lora(y, *turned, offsets, 0.5)
    if frozen_x:
        grouped_lora.grouped_lora(y, *turned, offsets, 0.5, needs_y=False)
    grouped_lora_backward.grouped_lora_wgrad(y, x, grad_low, low, offsets, 0.5)


def layer(shape):
    """Inference, then training of everything and of the input alone, with biases where F is odd."""
    dtype, score = shape.dtype, torch.float64 if shape.dtype == torch.float64 else torch.float32
    x = empty(shape.tokens, shape.width, dtype=dtype)
    gate_up = empty(shape.experts, 2 * shape.expert_width, shape.width, dtype=dtype)
    down = empty(shape.experts, shape.width, shape.expert_width, dtype=dtype)
    scores = empty(shape.tokens, shape.top_k, dtype=score)
    ids = empty(shape.tokens, shape.top_k, dtype=torch.int32)
    biased = shape.name == "odd"
    gate_up_bias = empty(*gate_up.shape[:2], dtype=dtype) if biased else None
    down_bias = empty(*down.shape[:2], dtype=dtype) if biased else None
    activation = ("swiglu_clamped" if biased else "silu", 7.0, 1.702)
    inputs = (x, gate_up, down, ids, scores, gate_up_bias, down_bias, *activation)
    fused.forward(*inputs, False)
    if shape.name.endswith("decode"):
        return
    _, *saved = fused.forward(*inputs, True)
    for needs in ([True] * 4 + [biased] * 2, [True, False, False, True, False, False]):
        fused.backward(x, x, gate_up, down, scores, *saved, down_bias, *activation, needs)


# What a change of the number of tokens must not compile anew.
EVERY_TOKEN = (sort_and_copy, layer, partial(lora, rank=16))
