"""Examples of `grouped_mm_quantized`, in every format and both ways.

Weights are no inputs: they have no gradients. They are as wide as their groups, whatever the sizes
are otherwise.
"""

import torch

from cases import SHAPES, Case, empty, ints
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

# Bits, group (None: the row), whether there are zero points.
FORMATS = {
    "int8": (8, None, False),
    "int8-128": (8, 128, False),
    "int4-64": (4, 64, False),
    "int4-32-zeros": (4, 32, True),
}


def parts_of(format, experts, rows, width, dtype):
    """Values, scales and zeros without data; rows of any width where a row has one scale."""
    bits, group, has_zeros = FORMATS[format]
    groups = experts, rows, width // (group or width)
    values = empty(experts, rows, width * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
    wide = dtype in (torch.float32, torch.float64)
    scales = empty(*groups, dtype=torch.float32 if wide else torch.bfloat16)
    return values, scales, empty(*groups, dtype=torch.uint8) if has_zeros else None


def formats(shape, everything):
    """The formats that a shape is launched in: one where widths are no multiples of groups."""
    if shape.name == "odd":
        return ["int8"]
    return list(FORMATS) if everything else ["int4-64"]


def launches(everything):
    for shape in SHAPES if everything else SHAPES[:2]:
        for format in formats(shape, everything):
            yield f"{shape.name} {format}", lambda shape=shape, format=format: launch(shape, format)


def launch(shape, format="int4-64"):
    """A forward with a bias and its backward."""
    from unimoe_kernels.ops.grouped_mm_quantized import kernel

    offsets, dtype = ints(shape.experts + 1), shape.dtype
    weight = parts_of(format, shape.experts, shape.expert_width, shape.width, dtype)
    x = empty(shape.rows, shape.width, dtype=dtype)
    bias = empty(shape.experts, shape.expert_width, dtype=dtype)
    y = kernel.grouped_mm_quantized(x, *weight, offsets, bias)
    kernel.grouped_mm_quantized(y, *weight, offsets, None, transposed=True)
    if shape.name.endswith("decode"):
        kernel.grouped_mm_quantized(x, *weight, offsets, bias, num_parts=2)
