"""Who is measured: each provider turns a problem into a layer `[1, T, D] -> [1, T, D]`.

A provider that cannot run raises `UnavailableError` with the reason.
"""

import copy

import torch
from torch import nn

from unimoe_kernels import LoopedMoE, SwiGLUFFN

from .problem import Problem


class UnavailableError(Exception):
    """Why a provider does not run here."""


def dense(problem: Problem) -> nn.Module:
    """One SwiGLU FFN as wide as K experts: the same multiplications a token, nothing to route."""
    D, F, _, K = problem.layer
    layer = SwiGLUFFN(D, K * F, device=problem.x.device, dtype=problem.x.dtype)
    x, gate, up = problem.x, layer.gate_proj.weight, layer.up_proj.weight
    hidden = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    torch.testing.assert_close(layer(x), hidden @ layer.down_proj.weight.T)
    return layer


def looped(problem: Problem) -> nn.Module:
    """The published layer, a Python loop over experts."""
    layer = LoopedMoE.from_moe(problem.moe)
    problem.check("looped", layer)
    return layer


def ours(problem: Problem) -> nn.Module:
    """`MoE`, on the backend that the dispatcher picks."""
    layer = _own_gradients(problem.moe)
    problem.check("ours", layer)
    return layer


def transformers_eager(problem: Problem) -> nn.Module:
    """Mixtral's block of transformers with its loop over the experts that are hit."""
    return _mixtral_block(problem, "eager")


def transformers_grouped_mm(problem: Problem) -> nn.Module:
    """Mixtral's block of transformers on `torch.nn.functional.grouped_mm`, its default."""
    return _mixtral_block(problem, "grouped_mm")


PROVIDERS = {
    "dense": dense,
    "looped": looped,
    "transformers-eager": transformers_eager,
    "transformers-grouped_mm": transformers_grouped_mm,
    "ours": ours,
}


def _own_gradients(layer: nn.Module) -> nn.Module:
    """A copy with parameters of its own on the same memory."""
    memo = {id(p): nn.Parameter(p.detach()) for p in layer.parameters()}
    return copy.deepcopy(layer, memo)


def _mixtral_block(problem: Problem, implementation: str) -> nn.Module:
    try:
        # Without this module experts are not stacked and cannot take our weights.
        import transformers.integrations.moe  # noqa: F401
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError as error:
        raise UnavailableError(f"transformers does not import: {error}") from error
    D, F, E, K = problem.layer
    config = MixtralConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config)
    state = {
        "gate.weight": problem.moe.router.weight,
        "experts.gate_up_proj": problem.moe.experts.gate_up_proj,
        "experts.down_proj": problem.moe.experts.down_proj,
    }
    state = {name: nn.Parameter(weight.detach()) for name, weight in state.items()}
    block.load_state_dict(state, assign=True)
    problem.check(f"transformers-{implementation}", block)
    return block
