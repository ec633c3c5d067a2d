"""Copying tokens into expert order, compared with torch and with copies in token order."""

import torch

from unimoe_kernels import permute

from .candidates import Work
from .op_problem import OpProblem, Routed, normal
from .shapes import LAYERS


def bench_permute(record, movement_case, device, dtype):
    D, _, _, K = LAYERS[movement_case.layer]
    routed = Routed(movement_case, device)
    x = normal(movement_case.tokens, D, like=routed.logits, dtype=dtype)
    token_of_row = routed.sort.row_order.long() // K
    work = Work(0, x.element_size() * D * movement_case.tokens * (1 + K))
    problem = OpProblem(movement_case, {"x": x}, lambda x: x[token_of_row], work)
    record(
        movement_case,
        {
            "torch": problem.provider("torch", lambda x: x.index_select(0, token_of_row)),
            "dense": problem.dense(lambda x: _repeat(x, K)),
            **problem.ours("permute", lambda x: permute(x, routed.sort, K)),
        },
        problem.work,
    )


def _repeat(x: torch.Tensor, top_k: int) -> torch.Tensor:
    return x[:, None].expand(-1, top_k, -1).reshape(-1, x.shape[1])
