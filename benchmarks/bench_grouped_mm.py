"""Matmul of every group of rows with its expert's weight, compared with one matmul of all rows."""

import torch
from torch.nn import functional as F

from unimoe_kernels import grouped_mm

from .candidates import Provider, UnavailableError, Work
from .op_problem import OpProblem, Routed, normal
from .shapes import LAYERS


def bench_grouped_mm(record, op_case, device, dtype):
    D, Fe, E, K = LAYERS[op_case.layer]
    routed = Routed(op_case, device)
    N = op_case.tokens * K
    x = normal(N, D, like=routed.logits, dtype=dtype)
    weight = normal(E, 2 * Fe, D, like=routed.logits, dtype=dtype, seed=1)
    offsets = routed.sort.expert_offsets

    def loop(x, weight):
        parts = x.split(routed.groups)
        return torch.cat([part @ w.T for part, w in zip(parts, weight, strict=True)])

    hit = sum(size > 0 for size in routed.groups)
    work = Work(4 * N * D * Fe, x.element_size() * (N * D + 2 * N * Fe + hit * 2 * Fe * D))
    problem = OpProblem(op_case, {"x": x, "weight": weight}, loop, work)
    record(
        op_case,
        {
            "dense": problem.dense(lambda x, weight: x @ weight.T, x=x, weight=weight[0]),
            "looped": problem.provider("looped", loop),
            "torch-grouped_mm": _of_torch(problem, offsets),
            **problem.ours("grouped_mm", lambda x, weight: grouped_mm(x, weight, offsets)),
        },
        problem.work,
    )


def _of_torch(problem: OpProblem, offsets: torch.Tensor) -> Provider:
    def run(x, weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets[1:])

    def provider():
        if not hasattr(F, "grouped_mm"):
            raise UnavailableError(f"torch {torch.__version__} has no grouped_mm")
        return problem.provider("torch-grouped_mm", run)()

    return provider
