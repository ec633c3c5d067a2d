"""The gate of a feed-forward network, compared with torch's silu and product."""

from torch.nn import functional as F

from unimoe_kernels import swiglu

from .candidates import Work
from .op_problem import OpProblem, Routed, normal
from .shapes import LAYERS


def bench_swiglu(record, op_case, device, dtype):
    _, Fe, _, K = LAYERS[op_case.layer]
    N = op_case.tokens * K
    gate_up = normal(N, 2 * Fe, like=Routed(op_case, device).logits, dtype=dtype)

    def dense(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    work = Work(6 * N * Fe, gate_up.element_size() * 3 * N * Fe)
    problem = OpProblem(op_case, {"gate_up": gate_up}, dense, work)
    record(
        op_case,
        {"dense": problem.provider("dense", dense), **problem.ours("swiglu", swiglu)},
        problem.work,
    )
