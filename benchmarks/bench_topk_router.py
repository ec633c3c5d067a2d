"""Top-k routing with losses, compared with torch's top-k and softmax without losses."""

from unimoe_kernels import topk_router

from .candidates import Work
from .op_problem import OpProblem, Routed
from .shapes import LAYERS


def bench_topk_router(record, movement_case, device, dtype):
    K = LAYERS[movement_case.layer].K
    logits = Routed(movement_case, device).logits

    def reference(logits):
        return logits.topk(K).values.softmax(-1)

    work = Work(0, 4 * logits.numel() + 8 * movement_case.tokens * K)
    problem = OpProblem(movement_case, {"logits": logits}, reference, work)
    record(
        movement_case,
        {
            "torch": problem.provider("torch", reference),
            **problem.ours("topk_router", lambda logits: topk_router(logits, K).scores),
        },
        problem.work,
    )
