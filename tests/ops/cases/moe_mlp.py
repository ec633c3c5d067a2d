"""Examples of `moe_mlp`, with biases and without."""

import torch

from cases import FP32, SHAPES, Case, empty, scores_of, with_tf32
from unimoe_kernels import moe_mlp


def experts(activation):
    def function(ids, num_experts, x, gate_up, down, scores, *biases):
        options = dict(zip(("gate_up_bias", "down_bias"), biases, strict=False))
        options["activation"] = activation
        return moe_mlp(x, gate_up, down, ids, scores_of(scores), **options)

    return function


def plain(sizes):
    s = sizes
    return (s.T, s.D), (s.E, 2 * s.F, s.D), (s.E, s.D, s.F), (s.T, s.K)


def biased(sizes):
    return *plain(sizes), (sizes.E, 2 * sizes.F), (sizes.E, sizes.D)


FOLLOWS_AUTOCAST = True

CASES = [
    Case("plain", experts("gelu"), plain),
    Case("biased", experts("silu"), biased),
    Case("clamped", experts("swiglu_clamped"), biased),
]


def launches(everything):
    for shape in SHAPES if everything else SHAPES[:2]:
        yield shape.name, lambda shape=shape: launch(shape)
    if everything:
        yield "tf32", with_tf32(lambda: launch(FP32))


def launch(shape):
    """Inference, then training of everything and of the input alone, with biases where F is odd."""
    from unimoe_kernels.ops.moe_mlp import fused
    from unimoe_kernels.ops.moe_mlp.arguments import ExpertWeights, Gate, Needs, Saved

    dtype = shape.dtype
    x = empty(shape.tokens, shape.width, dtype=dtype)
    gate_up = empty(shape.experts, 2 * shape.expert_width, shape.width, dtype=dtype)
    down = empty(shape.experts, shape.width, shape.expert_width, dtype=dtype)
    scores = empty(shape.tokens, shape.top_k, dtype=shape.score_dtype)
    ids = empty(shape.tokens, shape.top_k, dtype=torch.int32)
    has_bias = shape.name == "odd"
    weights = ExpertWeights(
        gate_up,
        down,
        empty(*gate_up.shape[:2], dtype=dtype) if has_bias else None,
        empty(*down.shape[:2], dtype=dtype) if has_bias else None,
    )
    gate = Gate("swiglu_clamped" if has_bias else "silu", 7.0, 1.702)
    fused.forward(x, ids, scores, weights, gate, False)
    if shape.name.endswith("decode"):
        return
    _, hidden, rows = fused.forward(x, ids, scores, weights, gate, True)
    saved = Saved(x, scores, weights, hidden, rows)
    for needs in ([True] * 4 + [has_bias] * 2, [True, False, False, True, False, False]):
        fused.backward(x, saved, gate, Needs(*needs))
