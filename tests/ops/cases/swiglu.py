"""Examples of `swiglu`, with each activation."""

from cases import SHAPES, Case, empty
from unimoe_kernels import swiglu
from unimoe_kernels.ops.swiglu.op import ACTIVATIONS


def gated(activation):
    return lambda ids, num_experts, gate_up: swiglu(gate_up, activation, limit=0.7)


CASES = [Case(name, gated(name), lambda s: ((s.T, 2 * s.F),)) for name in ACTIVATIONS]


def launches(everything):
    for name in ACTIVATIONS if everything else ACTIVATIONS[:1]:
        yield name, lambda name=name: launch(SHAPES[0], name)


def launch(shape, activation="silu"):
    from unimoe_kernels.ops.swiglu import kernel

    x = empty(shape.tokens, 2 * shape.expert_width, dtype=shape.dtype)
    y = kernel.swiglu(x, activation, 7.0, 1.702)
    kernel.swiglu_backward(y, x, activation, 7.0, 1.702)
