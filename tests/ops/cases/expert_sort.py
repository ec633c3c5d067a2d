"""Examples of `expert_sort`, which has nothing to differentiate."""

from cases import Case, at_every_shape, ints
from unimoe_kernels import expert_sort

CASES = [Case("ids", lambda ids, num_experts: tuple(expert_sort(ids, num_experts)), lambda s: ())]


def launches(everything):
    yield from at_every_shape(launch, everything)


def launch(shape):
    from unimoe_kernels.ops.expert_sort import kernel

    kernel.expert_sort(ints(shape.rows), shape.experts)
    kernel.expert_sort(ints(kernel.SMALL_ROWS), shape.experts)
