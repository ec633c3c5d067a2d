"""LoRA of every expert on its rows, beside one LoRA of all rows."""

import torch

from unimoe_kernels import grouped_lora

from .candidates import Work
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

    work = Work(2 * N * RANK * (D + 2 * Fe), inputs["x"].element_size() * N * (D + 2 * Fe))
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
            **problem.ours(
                "grouped_lora",
                lambda x, lora_A, lora_B: grouped_lora(
                    x, lora_A, lora_B, routed.sort.expert_offsets
                ),
            ),
        },
        problem.work,
    )
