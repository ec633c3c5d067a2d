"""A layer with quantised experts beside the same layer with its float weights, and beside peers.

`ours` is int4 in groups of 64, or of 32 where a width is no multiple of 64. Each quantised layer is
checked beside a float layer of the numbers that it stands for; what rounding costs is in
docs/quantization.md. `dense-torchao` is the dense layer with torchao's int8 weights.
"""

import copy
import functools
import itertools

import torch
from torch import nn

from unimoe_kernels import MoE, SwiGLUFFN, dequantize_weight, quantize_experts
from unimoe_kernels.testing import relative_error

from .candidates import Candidate, Provider, UnavailableError, in_turns, own_gradients
from .problem import TOLERANCE, Problem, problems_of
from .quantized_peers import QUANTIZED_LAYERS
from .remote import RemoteLayer

# Format, whether numbers have scales by group, and zero points.
FORMATS = {
    "ours-int8": ("int8", False, False),
    "ours-int8-groups": ("int8", True, False),
    "ours-int4-zeros": ("int4", True, True),
    "ours": ("int4", True, False),
}


def bench_quantized(record, quantized_case, device, dtype):
    problems, turns = problems_of(quantized_case, device, dtype), itertools.count()

    def of_all(make):
        return lambda: in_turns([make(problem) for problem in problems], turns)

    makers = {"ours-float": _float, "dense": _dense, "dense-torchao": _dense_torchao}
    makers |= {name: functools.partial(_quantized, name) for name in FORMATS}
    providers: dict[str, Provider] = {name: of_all(make) for name, make in makers.items()}
    providers |= {name: functools.partial(_peer, name, problems[0]) for name in QUANTIZED_LAYERS}
    record(quantized_case, providers, problems[0].work)


def _float(problem: Problem) -> Candidate:
    return problem.candidate("ours-float", own_gradients(problem.moe))


def _dense(problem: Problem) -> Candidate:
    return problem.candidate("dense", _dense_layer(problem), comparable=False)


def _dense_torchao(problem: Problem) -> Candidate:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise UnavailableError(f"torchao does not import: {error}") from error
    layer = _dense_layer(problem)
    quantize_(layer, Int8WeightOnlyConfig())
    return problem.candidate("dense-torchao", layer, comparable=False)


def _dense_layer(problem: Problem) -> nn.Module:
    D, F, _, K = problem.layer
    layer = SwiGLUFFN(D, K * F, device=problem.x.device, dtype=problem.x.dtype)
    for weight in layer.parameters():
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return layer


def _peer(name: str, problem: Problem) -> Candidate:
    if problem.x.device.type != "cpu":
        raise UnavailableError(f"{name} runs on CPUs")
    if problem.x.dtype != torch.bfloat16 or problem.case.mode != "forward":
        raise UnavailableError(f"{name} is measured in bfloat16, without gradients")
    remote = RemoteLayer(name, problem.case, problem.x.dtype)
    return Candidate(run=remote.time_one_call, in_process=False)


def _quantized(name: str, problem: Problem) -> Candidate:
    format, is_grouped, zero_points = FORMATS[name]
    group_size = problem.layer.group_size if is_grouped else None
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
