"""What a call costs the host: layers so small that nothing else takes time.

The anchor is Mixtral's block of transformers on torch's grouped matmul. `gate` is the router of
that block alone, which `ours-transformers`, the same block on `"unimoe"`, runs as well.
"""

import functools
from collections.abc import Callable

import torch
from torch import nn

from unimoe_kernels import SwiGLUFFN, register_with_transformers

from .candidates import Candidate, UnavailableError, own_gradients
from .problem import Problem
from .providers import mixtral_block


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
