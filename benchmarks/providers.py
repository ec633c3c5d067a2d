"""Providers of whole layers: each creates a candidate from a problem.

A provider that cannot run raises `UnavailableError` with the reason.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

import unimoe_kernels
from unimoe_kernels import SwiGLUFFN, _extension

from .candidates import Candidate, Provider, UnavailableError, in_turns, own_gradients
from .problem import Problem
from .remote import RemoteLayer

BATCHED_ROWS = 64
"""Rows above which `batched_mm` is omitted: it copies an expert's weights for every row."""


def layer_providers(problems: Sequence[Problem]) -> dict[str, Provider]:
    """Returns all providers of a case, the anchor first; their calls cycle through the problems."""
    makers: dict[str, Callable[[Problem], Candidate]] = {
        "dense": _dense,
        "looped": _looped,
        "transformers-eager": functools.partial(_transformers, implementation="eager"),
        "transformers-grouped_mm": functools.partial(_transformers, implementation="grouped_mm"),
        "transformers-batched_mm": functools.partial(_transformers, implementation="batched_mm"),
        "liger": _liger,
        "ours": _ours,
    }
    device = problems[0].x.device
    _, *others = unimoe_kernels.available_backends("permute", device)
    for backend in others:
        if device.type == "cuda" and backend != "reference":
            makers[f"ours-{backend}"] = functools.partial(_ours, backend=backend)
    if device.type == "cpu":
        makers["ours-packed"] = _ours_packed
    turns = itertools.count()
    providers: dict[str, Provider] = {
        name: functools.partial(_of_all, make, problems, turns) for name, make in makers.items()
    }
    return providers | {"zentorch": functools.partial(_zentorch, problems[0])}


def _of_all(
    make: Callable[[Problem], Candidate], problems: Sequence[Problem], turns: Iterator[int]
) -> Candidate:
    return in_turns([make(problem) for problem in problems], turns)


def _dense(problem: Problem) -> Candidate:
    """One SwiGLU FFN as wide as K experts: the same FLOPs per token, without routing."""
    D, F, _, K = problem.layer
    layer = SwiGLUFFN(D, K * F, device=problem.x.device, dtype=problem.x.dtype)
    for weight in layer.parameters():
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return problem.candidate("dense", layer, comparable=False)


def _looped(problem: Problem) -> Candidate:
    """The published layer, a Python loop over experts."""
    return problem.candidate("looped", problem.moe.to_looped())


def _ours(problem: Problem, backend: str | None = None) -> Candidate:
    """`MoE` on the default backend, or on a given one."""
    layer = own_gradients(problem.moe)
    return problem.candidate("ours", layer if backend is None else _OnBackend(layer, backend))


def _ours_packed(problem: Problem) -> Candidate:
    """`MoE` with weights packed in advance."""
    if problem.case.mode != "forward":
        raise UnavailableError("packed weights support inference only")
    unpacked_rows = _extension.build_info().get("unpacked_rows", 0)
    if problem.case.tokens * problem.layer.K <= unpacked_rows * problem.layer.E:
        raise UnavailableError(f"up to {unpacked_rows} rows per expert read the unpacked weights")
    layer = own_gradients(problem.moe)
    try:
        unimoe_kernels.pack_weights(layer)
    except RuntimeError as error:
        raise UnavailableError(str(error)) from error
    return problem.candidate("ours-packed", layer)


class _OnBackend(nn.Module):
    def __init__(self, layer: nn.Module, backend: str) -> None:
        super().__init__()
        self.layer, self.router, self._backend = layer, layer.router, backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with unimoe_kernels.use_backend(self._backend):
            return self.layer(x)


def _transformers(problem: Problem, implementation: str) -> Candidate:
    rows = problem.case.tokens * problem.layer.K
    if implementation == "batched_mm" and rows > BATCHED_ROWS:
        raise UnavailableError(f"it copies the weights for each row; left out above {BATCHED_ROWS}")
    block = mixtral_block(problem, implementation)
    return problem.candidate(f"transformers-{implementation}", block)


def mixtral_block(problem: Problem, implementation: str) -> nn.Module:
    """Mixtral's block of transformers, with one of its experts implementations.

    Raises:
        UnavailableError: If transformers does not import.
    """
    try:
        # Without this module experts are not stacked and cannot use our weights.
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
    return block


def _zentorch(problem: Problem) -> Candidate:
    """AMD's fused layer for CPUs, inference only, in a process of its own.

    Importing zentorch changes how torch runs, and it repacks weights in place.
    """
    if problem.x.device.type != "cpu":
        raise UnavailableError("zentorch runs on CPUs")
    if problem.case.mode != "forward":
        raise UnavailableError("zentorch has no backward")
    remote = RemoteLayer("zentorch", problem.case, problem.x.dtype)
    return Candidate(run=remote.time_one_call, in_process=False)


def _liger(problem: Problem) -> Candidate:
    """Liger-Kernel's fused experts behind Mixtral's router."""
    if problem.x.device.type != "cuda":
        raise UnavailableError("liger-kernel runs on GPUs")
    try:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
    except ImportError as error:
        raise UnavailableError(f"liger-kernel does not import: {error}") from error
    return problem.candidate("liger", _LigerLayer(problem, LigerFusedMoEFunction))


class _LigerLayer(nn.Module):
    def __init__(self, problem: Problem, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        layer = own_gradients(problem.moe)
        self.router, self.experts, self._function = layer.router, layer.experts, function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores_TK, ids_TK = torch.topk(x[0] @ self.router.weight.T, self.router.top_k)
        scores_TK = scores_TK.softmax(-1, dtype=torch.float32).to(x.dtype)
        gate_up, down = self.experts.gate_up_proj, self.experts.down_proj
        return self._function.apply(x[0], gate_up, down, ids_TK.int(), scores_TK)[None]
