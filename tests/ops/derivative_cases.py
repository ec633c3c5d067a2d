"""Calls of every differentiable operator on small float64 inputs, for `test_derivatives.py`.

A new operator is declared and then fails there until it has a case here.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from unimoe_kernels import (
    expert_sort,
    grouped_lora,
    grouped_mm,
    moe_mlp,
    permute,
    swiglu,
    topk_router,
    unpermute,
)
from unimoe_kernels.ops.swiglu.op import ACTIVATIONS
from unimoe_kernels.ops.topk_router.op import MODES

T, D, F, E, K, R = 3, 2, 2, 3, 2, 2
# Operators that have nothing to differentiate.
WITHOUT = ("expert_sort",)


class Case(NamedTuple):
    """A function of the differentiable inputs alone, and the shapes of these."""

    name: str
    function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    shapes: tuple[tuple[int, ...], ...]

    def inputs(self):
        """Draws the inputs, in float64."""
        return tuple(torch.randn(shape, dtype=torch.float64) for shape in self.shapes)


def ids_and_sort():
    """Ids of which one is another rank's (E), and their order."""
    ids = torch.tensor([[0, 2], [2, E], [0, 2]], dtype=torch.int32)
    return ids, expert_sort(ids, E)


def router(mode, **options):
    def function(logits):
        route = topk_router(logits, K, mode=mode, **options)
        return route.scores, route.load_balancing_loss, route.router_z_loss

    return function


def permuted(x):
    return permute(x, ids_and_sort()[1], K)


def unpermuted(rows, scores=None):
    return unpermute(rows, ids_and_sort()[1], K, scores)


def multiplied(x, weight, bias=None):
    return grouped_mm(x, weight, ids_and_sort()[1].expert_offsets, bias)


def low_rank(x, lora_A, lora_B):
    return grouped_lora(x, lora_A, lora_B, ids_and_sort()[1].expert_offsets, 0.5)


def experts(activation):
    def function(x, gate_up, down, scores, *biases):
        biases = dict(zip(("gate_up_bias", "down_bias"), biases, strict=False))
        ids = ids_and_sort()[0]
        return moe_mlp(x, gate_up, down, ids, scores, activation=activation, **biases)

    return function


def gated(activation):
    return lambda gate_up: swiglu(gate_up, activation, limit=0.7)


_MASK = torch.tensor([True, False, True])
_MLP = ((T, D), (E, 2 * F, D), (E, D, F), (T, K))

# The first case of each operator also runs in Triton's interpreter.
CASES = {
    "swiglu": [Case(name, gated(name), ((T, 2 * F),)) for name in ACTIVATIONS],
    "topk_router": [Case(mode, router(mode), ((T, E),)) for mode in MODES]
    + [
        Case("masked", router("softmax_topk", token_mask=_MASK, balance="first"), ((T, E),)),
        Case("scaled", router("sigmoid_renorm", token_mask=_MASK, scale=2.0), ((T, E),)),
    ],
    "permute": [Case("rows", permuted, ((T, D),))],
    "unpermute": [
        Case("weighted", unpermuted, ((T * K, D), (T, K))),
        Case("summed", unpermuted, ((T * K, D),)),
    ],
    "grouped_mm": [
        Case("biased", multiplied, ((T * K, D), (E, F, D), (E, F))),
        Case("plain", multiplied, ((T * K, D), (E, F, D))),
    ],
    "grouped_lora": [Case("rows", low_rank, ((T * K, D), (E, R, D), (E, F, R)))],
    "moe_mlp": [
        Case("plain", experts("gelu"), _MLP),
        Case("biased", experts("silu"), (*_MLP, (E, 2 * F), (E, D))),
        Case("clamped", experts("swiglu_clamped"), (*_MLP, (E, 2 * F), (E, D))),
    ],
}
