"""Examples of `permute`."""

from cases import Case, at_every_shape, empty, ints
from unimoe_kernels import expert_sort, permute


def permuted(ids, num_experts, x):
    return permute(x, expert_sort(ids, num_experts), ids.shape[1])


CASES = [Case("rows", permuted, lambda s: ((s.T, s.D),))]


def launches(everything):
    yield from at_every_shape(launch, everything)


def launch(shape):
    from unimoe_kernels.ops.permute import kernel

    x = empty(shape.tokens, shape.width, dtype=shape.dtype)
    kernel.permute(x, ints(shape.rows), ints(shape.experts + 1), shape.top_k)
