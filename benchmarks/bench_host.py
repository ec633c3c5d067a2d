"""Host time of a call, for layers so small that everything else is negligible.

The anchor is Mixtral's block of transformers with torch's grouped matmul. `gate` is the router of
that block alone, which `ours-transformers`, the same block with `"unimoe"`, runs as well.

`bench_layer_call` is `moe_mlp` alone, in CUDA C++ and in Triton.
"""

import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn

from unimoe_kernels import (
    SwiGLUFFN,
    available_backends,
    moe_mlp,
    register_with_transformers,
    use_backend,
)

from .candidates import Candidate, UnavailableError, Work, own_gradients
from .problem import Problem
from .providers import mixtral_block
from .shapes import LAYERS

CALLS = 50
"""Calls of a layer that are timed together: setting up the GPU stand-in takes longer than one."""


def bench_host(record, host_case, device, dtype):
    problem = Problem(host_case, device, dtype)

    def provider(name: str, layer_of: Callable[[], nn.Module], comparable: bool = True):
        return lambda: problem.candidate(name, layer_of(), comparable)

    providers = {
        name: provider(name, functools.partial(_block, problem, name.removeprefix("transformers-")))
        for name in ("transformers-grouped_mm", "transformers-eager")
    }
    providers |= {
        "dense": provider("dense", functools.partial(_dense, problem), comparable=False),
        "gate": lambda: _gate(problem),
        "ours-transformers": provider(
            "ours-transformers", functools.partial(_block, problem, "unimoe")
        ),
        "ours": provider("ours", lambda: own_gradients(problem.moe)),
    }
    record(host_case, providers, problem.work)


def _dense(problem: Problem) -> nn.Module:
    D, F, _, K = problem.layer
    return SwiGLUFFN(D, K * F, device=problem.x.device, dtype=problem.x.dtype)


def _block(problem: Problem, implementation: str) -> nn.Module:
    if implementation == "unimoe":
        try:
            register_with_transformers()
        except ImportError as error:
            raise UnavailableError(str(error)) from error
    return mixtral_block(problem, implementation)


def _gate(problem: Problem) -> Candidate:
    gate = mixtral_block(problem, "eager").gate
    x_TD = problem.x[0]
    grad_TK = torch.randn(len(x_TD), problem.layer.K, device=x_TD.device, dtype=x_TD.dtype)

    def forward() -> None:
        with torch.no_grad():
            gate(x_TD)

    def training() -> None:
        gate.zero_grad(set_to_none=True)
        _, scores_TK, _ = gate(x_TD.detach().requires_grad_())
        scores_TK.backward(grad_TK.to(scores_TK.dtype))

    return Candidate(run=training if problem.case.mode == "training" else forward)


def bench_layer_call(record, launch_case, device):
    """Host time of `moe_mlp` without gradients; without a GPU, launches have no effect.

    The anchor is Triton with sort and sum in CUDA C++; `triton-alone` is Triton only.
    """
    if launch_case.mode == "training":
        pytest.skip("of inference alone")
    pytest.importorskip("triton", reason="the package triton is not installed")
    providers = {
        name: functools.partial(_layer_call, launch_case, device, way)
        for name, way in (("triton", "triton"), ("triton-alone", "triton-alone"), ("ours", "cuda"))
    }
    record(launch_case, providers, Work(0, 0))


def _layer_call(case, device, way: str) -> Candidate:
    D, F, E, K = LAYERS[case.layer]
    like = {"device": device, "dtype": torch.bfloat16}
    x = torch.randn(case.tokens, D, **like)
    weights = torch.randn(E, 2 * F, D, **like), torch.randn(E, D, F, **like)
    ids = torch.randint(0, E, (case.tokens, K), device=device, dtype=torch.int32)
    scores = torch.rand(case.tokens, K, device=device)
    on_device = _on_device(device, way)

    def run() -> float:
        with on_device(), torch.no_grad():
            moe_mlp(x, *weights, ids, scores)
            start = time.perf_counter()
            for _ in range(CALLS):
                moe_mlp(x, *weights, ids, scores)
            return (time.perf_counter() - start) / CALLS

    return Candidate(run=run)


def _on_device(device: torch.device, way: str) -> Callable[[], AbstractContextManager]:
    if device.type == "cpu":
        from .stand_in_layer import load_host_code, stand_in_layer

        load_host_code()
        return functools.partial(stand_in_layer, way)
    if way not in available_backends("moe_mlp", device):
        raise UnavailableError(f"{way} is not a backend of moe_mlp here")
    return functools.partial(use_backend, way)
