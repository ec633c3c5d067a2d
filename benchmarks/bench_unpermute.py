"""Weighted sum of each token's rows, compared with torch and with rows in token order."""

from torch.nn import functional

from unimoe_kernels import unpermute

from .candidates import Work
from .op_problem import OpProblem, Routed, normal
from .shapes import LAYERS


def bench_unpermute(record, movement_case, device, dtype):
    D, _, _, K = LAYERS[movement_case.layer]
    routed = Routed(movement_case, device)
    T = movement_case.tokens
    rows = normal(T * K, D, like=routed.logits, dtype=dtype)
    position = routed.sort.inverse_order.long()

    def weighted(rows, scores):
        return (rows.view(T, K, -1) * scores.to(rows.dtype)[..., None]).sum(1)

    def bag(rows, scores):
        weights = scores.to(rows.dtype)
        return functional.embedding_bag(
            position.view(T, K), rows, per_sample_weights=weights, mode="sum"
        )

    problem = OpProblem(
        movement_case,
        {"rows": rows, "scores": routed.scores},
        lambda rows, scores: weighted(rows[position], scores),
        Work(2 * T * K * D, rows.element_size() * D * T * (1 + K)),
    )
    record(
        movement_case,
        {
            "embedding_bag": problem.provider("embedding_bag", bag),
            "dense": problem.dense(weighted),
            "torch": problem.provider(
                "torch", lambda rows, scores: weighted(rows.index_select(0, position), scores)
            ),
            **problem.ours(
                "unpermute", lambda rows, scores: unpermute(rows, routed.sort, K, scores)
            ),
        },
        problem.work,
    )
