"""LoRA of every expert on its rows, compared with one LoRA of all rows and torch's grouped matmuls.

Bytes read and written are those of x, y and the weights of experts with rows; those of a backward
are twice as many, because it reads the gradient of y both for that of x and for that of B.
"""

import torch
from torch.nn import functional as F

from unimoe_kernels import grouped_lora

from .candidates import Provider, UnavailableError, Work
from .op_problem import OpProblem, Routed, normal
from .shapes import LAYERS

RANK = 16


def bench_grouped_lora(record, op_case, device, dtype):
    D, Fe, E, K = LAYERS[op_case.layer]
    routed = Routed(op_case, device)
    N = op_case.tokens * K
    inputs = {
        "x": normal(N, D, like=routed.logits, dtype=dtype),
        "lora_A": normal(E, RANK, D, like=routed.logits, dtype=dtype, seed=1),
        "lora_B": normal(E, 2 * Fe, RANK, like=routed.logits, dtype=dtype, seed=2),
    }

    def loop(x, lora_A, lora_B):
        groups = zip(x.split(routed.groups), lora_A, lora_B, strict=True)
        return torch.cat([part @ a.T @ b.T for part, a, b in groups])

    hit = sum(size > 0 for size in routed.groups)
    columns = D + 2 * Fe
    size = inputs["x"].element_size()
    work = Work(2 * N * RANK * columns, size * (N + hit * RANK) * columns)
    problem = OpProblem(op_case, inputs, loop, work)
    record(
        op_case,
        {
            "dense": problem.dense(
                lambda x, lora_A, lora_B: x @ lora_A.T @ lora_B.T,
                x=inputs["x"],
                lora_A=inputs["lora_A"][0],
                lora_B=inputs["lora_B"][0],
            ),
            "looped": problem.provider("looped", loop),
            "torch-grouped_mm": _of_torch(problem, routed.sort.expert_offsets),
            **problem.ours(
                "grouped_lora",
                lambda x, lora_A, lora_B: grouped_lora(
                    x, lora_A, lora_B, routed.sort.expert_offsets
                ),
            ),
        },
        problem.work,
    )


def _of_torch(problem: OpProblem, offsets: torch.Tensor) -> Provider:
    def run(x, lora_A, lora_B):
        low = F.grouped_mm(x, lora_A.transpose(1, 2), offs=offsets[1:])
        return F.grouped_mm(low, lora_B.transpose(1, 2), offs=offsets[1:])

    def provider():
        if not hasattr(F, "grouped_mm"):
            raise UnavailableError(f"torch {torch.__version__} has no grouped_mm")
        return problem.provider("torch-grouped_mm", run)()

    return provider
