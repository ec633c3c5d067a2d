"""Examples of `grouped_mm`, with a bias and without."""

from cases import Case, at_every_shape, empty, ints
from unimoe_kernels import expert_sort, grouped_mm


def multiplied(ids, num_experts, x, weight, bias=None):
    return grouped_mm(x, weight, expert_sort(ids, num_experts).expert_offsets, bias)


FOLLOWS_AUTOCAST = True

CASES = [
    Case("biased", multiplied, lambda s: ((s.N, s.D), (s.E, s.F, s.D), (s.E, s.F))),
    Case("plain", multiplied, lambda s: ((s.N, s.D), (s.E, s.F, s.D))),
]


def launches(everything):
    yield from at_every_shape(launch, everything)


def launch(shape):
    """A forward and its backward; then rows gathered from tokens, as in a fused layer."""
    from unimoe_kernels.ops.grouped_mm import kernel

    offsets, dtype = ints(shape.experts + 1), shape.dtype
    x = empty(shape.rows, shape.width, dtype=dtype)
    weight = empty(shape.experts, shape.expert_width, shape.width, dtype=dtype)
    bias = empty(shape.experts, shape.expert_width, dtype=dtype)
    y = kernel.grouped_mm(x, weight, offsets, bias)
    kernel.grouped_mm(y, weight.transpose(1, 2), offsets, None)
    kernel.grouped_mm_wgrad(y, x, offsets, True)
    tokens, order = empty(shape.tokens, shape.width, dtype=dtype), ints(shape.rows)
    kernel.grouped_mm(tokens, weight, offsets, None, order, shape.top_k, tail=False)
