"""Examples of `moe_mlp_quantized`, in both formats; weights are no inputs."""

import torch

from cases import SHAPES, Case, empty, scores_of
from cases.grouped_mm_quantized import formats, parts_of
from unimoe_kernels import moe_mlp_quantized, quantize_weight

WIDTH, EXPERT_WIDTH, MOST_EXPERTS = 32, 64, 4


def weights_of(*formats, **options):
    """Both projections, the second of another format or of the same."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2 * EXPERT_WIDTH, WIDTH), (WIDTH, EXPERT_WIDTH))
    return [
        quantize_weight(
            torch.randn(MOST_EXPERTS, *shape, generator=generator) / shape[1] ** 0.5,
            format,
            32 if format == "int4" else None,
            **options,
        )
        for shape, format in zip(shapes, formats, strict=True)
    ]


def experts(weights, activation):
    def function(ids, num_experts, x, gate_up_bias, down_bias, scores):
        first, down = (weight.of_experts(0, num_experts) for weight in weights)
        return moe_mlp_quantized(
            x,
            first,
            down,
            ids,
            scores_of(scores),
            activation=activation,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
        )

    return function


def shapes(sizes):
    s = sizes
    return (s.T, WIDTH), (s.E, 2 * EXPERT_WIDTH), (s.E, WIDTH), (s.T, s.K)


FOLLOWS_AUTOCAST = True

CASES = [
    Case("int8", experts(weights_of("int8", "int8"), "silu"), shapes),
    Case("int4", experts(weights_of("int4", "int4"), "gelu"), shapes),
    Case("mixed", experts(weights_of("int4", "int8"), "swiglu_clamped"), shapes),
]


def launches(everything):
    for shape in SHAPES if everything else SHAPES[:2]:
        for format in formats(shape, everything):
            yield f"{shape.name} {format}", lambda shape=shape, format=format: launch(shape, format)


def launch(shape, format="int4-64"):
    """Inference and training; of few rows also one token, whose sums are cut into parts."""
    from unimoe_kernels.ops.moe_mlp_quantized import fused

    size, dtype = (shape.experts, shape.width, shape.expert_width), shape.dtype
    experts, width, expert_width = size
    weights = (
        *parts_of(format, experts, 2 * expert_width, width, dtype),
        format[:4],
        *parts_of(format, experts, width, expert_width, dtype),
        format[:4],
    )
    has_bias = shape.name == "odd"
    biases = [empty(experts, n, dtype=dtype) for n in (2 * expert_width, width)]
    gate = ("swiglu_clamped" if has_bias else "silu", 7.0, 1.702)
    few = shape.name.endswith("decode")
    for tokens, keep_hidden in ((shape.tokens, few), (1 if few else shape.tokens, not few)):
        x = empty(tokens, width, dtype=dtype)
        scores = empty(tokens, shape.top_k, dtype=shape.score_dtype)
        ids = empty(tokens, shape.top_k, dtype=torch.int32)
        flat = (*weights, *(biases if has_bias else (None, None)), *gate, keep_hidden)
        fused.forward(x, ids, scores, *flat)
