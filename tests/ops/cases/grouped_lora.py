"""Examples of `grouped_lora`, at ranks narrow and wide, a power of 2 or not."""

import itertools

import torch

from cases import FP32, SHAPES, Case, empty, ints, with_tf32
from unimoe_kernels import expert_sort, grouped_lora

# Not a power of 2 where widths are odd, too; above 32 for types that tensor cores multiply.
RANKS = (16, 8, 5, 32, 64, 128)


def with_few_rows(shape):
    """The shape with as many tokens as the kernels take, for matmuls would run the others."""
    return shape._replace(tokens=min(shape.tokens, 64 * shape.experts // shape.top_k))


COVERED = [with_few_rows(shape) for shape in SHAPES]
FEW_RANKS = ((COVERED[0], 16), (COVERED[2], 5))


def low_rank(ids, num_experts, x, lora_A, lora_B):
    return grouped_lora(x, lora_A, lora_B, expert_sort(ids, num_experts).expert_offsets, 0.5)


FOLLOWS_AUTOCAST = True

CASES = [Case("rows", low_rank, lambda s: ((s.N, s.D), (s.E, s.R, s.D), (s.E, s.F, s.R)))]


def launches(everything):
    for shape, rank in itertools.product(COVERED, RANKS) if everything else FEW_RANKS:
        yield f"{shape.name}-r{rank}", lambda shape=shape, rank=rank: launch(shape, rank)
    # One token: the sums of an expert's rows are shared out by a launch of their own.
    first = SHAPES[0]
    yield "long", lambda: launch(first._replace(tokens=1), 64, frozen_x=False)
    if everything:
        yield from few_rows_and_long_sums(first)
        for rank in (16, 64):
            yield "tf32", with_tf32(lambda rank=rank: launch(with_few_rows(FP32), rank))


def few_rows_and_long_sums(shape):
    """Yields launches whose sums are shared out, besides those of one token."""
    some = shape._replace(tokens=256)
    for rank in (16, 64):
        yield f"long-r{rank}", lambda rank=rank: launch(some, rank, frozen_x=False)
    for name, dtype in (("fp32", torch.float32), ("fp64", torch.float64)):
        wide = shape._replace(tokens=16, dtype=dtype)
        yield f"{name}-long", lambda wide=wide: launch(wide, 32, frozen_x=False)


def launch(shape, rank=16, frozen_x=True):
    """A forward at the first projection, and its backward; `frozen_x` adds one without x's."""
    from unimoe_kernels.ops.grouped_lora import kernel, kernel_backward

    dtype = shape.dtype
    x = empty(shape.rows, shape.width, dtype=dtype)
    lora_A = empty(shape.experts, rank, shape.width, dtype=dtype)
    lora_B = empty(shape.experts, 2 * shape.expert_width, rank, dtype=dtype)
    if not kernel.covers(x, lora_A, lora_B):
        return
    offsets = ints(shape.experts + 1)
    y, low = kernel.grouped_lora(x, lora_A, lora_B, offsets, 0.5)
    turned = (lora_B.transpose(1, 2), lora_A.transpose(1, 2))
    _, grad_low = kernel.grouped_lora(y, *turned, offsets, 0.5)
    if frozen_x:
        kernel.grouped_lora(y, *turned, offsets, 0.5, needs_y=False)
    kernel_backward.grouped_lora_wgrad(y, x, grad_low, low, offsets, 0.5)
