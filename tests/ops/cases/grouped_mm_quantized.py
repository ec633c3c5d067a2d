"""Examples of `grouped_mm_quantized`, in every format and both ways.

Weights are no inputs: they have no gradients. They are as wide as their groups, whatever the sizes
are otherwise.
"""

import torch

from cases import Case
from unimoe_kernels import expert_sort, grouped_mm_quantized, quantize_weight

WIDTH, DEPTH, MOST_EXPERTS = 6, 64, 4


def weight_of(format, group_size, **options):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(MOST_EXPERTS, WIDTH, DEPTH, generator=generator) / DEPTH**0.5
    return quantize_weight(values, format, group_size, **options)


WEIGHTS = {
    "int8": weight_of("int8", None),
    "int8 groups": weight_of("int8", 32),
    "int4": weight_of("int4", 32),
    "int4 zeros": weight_of("int4", 64, zero_points=True),
}


def multiplied(weight, transposed=False):
    def function(ids, num_experts, x, bias):
        own = weight.of_experts(0, num_experts)
        offsets = expert_sort(ids, num_experts).expert_offsets
        return grouped_mm_quantized(x, own, offsets, bias, transposed=transposed)

    return function


def shapes(sizes):
    return (sizes.N, DEPTH), (sizes.E, WIDTH)


def transposed_shapes(sizes):
    return (sizes.N, WIDTH), (sizes.E, DEPTH)


FOLLOWS_AUTOCAST = True

CASES = [
    *(Case(name, multiplied(weight), shapes) for name, weight in WEIGHTS.items()),
    *(
        Case(f"{name} transposed", multiplied(WEIGHTS[name], True), transposed_shapes)
        for name in ("int8", "int4 zeros")
    ),
]
