"""A layer with quantised experts beside the same layer with its float weights.

`ours` is int4 in groups of 64, or of 32 where a width is no multiple of 64. Each quantised layer is
checked beside a float layer of the numbers that it stands for; what rounding costs is in
docs/quantization.md.
"""

import copy
import functools
import itertools

import torch
from torch import nn

from unimoe_kernels import MoE, SwiGLUFFN, dequantize_weight, quantize_experts
from unimoe_kernels.testing import relative_error

from .candidates import Candidate, in_turns, own_gradients
from .problem import TOLERANCE, Problem, problems_of

FORMATS = {
    "int8": ("int8", None, False),
    "int8-groups": ("int8", 64, False),
    "int4-zeros": ("int4", 64, True),
    "ours": ("int4", 64, False),
}


def bench_quantized(record, quantized_case, device, dtype):
    problems, turns = problems_of(quantized_case, device, dtype), itertools.count()

    def of_all(make):
        return lambda: in_turns([make(problem) for problem in problems], turns)

    makers = {"floats": _floats, "dense": _dense}
    makers |= {name: functools.partial(_quantized, name) for name in FORMATS}
    record(
        quantized_case,
        {name: of_all(make) for name, make in makers.items()},
        problems[0].work,
    )


def _floats(problem: Problem) -> Candidate:
    return problem.candidate("floats", own_gradients(problem.moe))


def _dense(problem: Problem) -> Candidate:
    D, F, _, K = problem.layer
    layer = SwiGLUFFN(D, K * F, device=problem.x.device, dtype=problem.x.dtype)
    for weight in layer.parameters():
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return problem.candidate("dense", layer, comparable=False)


def _quantized(name: str, problem: Problem) -> Candidate:
    D, F, _, _ = problem.layer
    format, group_size, zero_points = FORMATS[name]
    if group_size is not None and (D % group_size or F % group_size):
        group_size = 32
    layer = copy.deepcopy(problem.moe)
    quantize_experts(layer, format, group_size, zero_points=zero_points)

    def check() -> None:
        with torch.no_grad():
            # Two right routers may differ on the other tokens.
            output = layer(problem.x)[0, problem.clear]
            expected = _exact(problem.moe, layer)(problem.x.float())[0, problem.clear]
        error = relative_error(output, expected)
        limit = TOLERANCE[problem.x.dtype]
        assert error < limit, f"{name}: output has relative error {error:.2g}, limit {limit}"

    candidate = problem.candidate(name, layer, comparable=False)
    return Candidate(
        run=candidate.run,
        check=check,
        forward=candidate.forward,
        weights=(*layer.parameters(), *layer.buffers()),
    )


def _exact(moe: MoE, quantized: MoE) -> MoE:
    """The layer in float32 whose weights are what the quantised ones stand for."""
    exact = copy.deepcopy(moe).float()
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            weight = dequantize_weight(getattr(quantized.experts, name).weight, torch.float32)
            getattr(exact.experts, name).copy_(weight)
    return exact
