"""The experts without their router, compared with a dense network with the same FLOPs."""

import torch
from torch.func import functional_call
from torch.nn import functional as F

from unimoe_kernels import moe_mlp

from .candidates import Provider, UnavailableError, Work
from .op_problem import OpProblem, Routed, normal
from .shapes import LAYERS, Layer


def bench_moe_mlp(record, op_case, device, dtype):
    layer = D, Fe, E, K = LAYERS[op_case.layer]
    routed = Routed(op_case, device)
    N, like = op_case.tokens * K, routed.logits
    inputs = {
        "x": normal(op_case.tokens, D, like=like, dtype=dtype),
        "gate_up_proj": normal(E, 2 * Fe, D, like=like, dtype=dtype, seed=1),
        "down_proj": normal(E, D, Fe, like=like, dtype=dtype, seed=2),
        "scores": routed.scores,
    }

    def loop(x, gate_up_proj, down_proj, scores):
        y = torch.zeros_like(x)
        for expert in range(E):
            token, choice = torch.where(routed.ids == expert)
            gate, up = (x[token] @ gate_up_proj[expert].T).chunk(2, dim=-1)
            rows = (F.silu(gate) * up) @ down_proj[expert].T
            y = y.index_add(0, token, rows * scores[token, choice, None].to(rows.dtype))
        return y

    hit = sum(size > 0 for size in routed.groups)
    size = inputs["x"].element_size()
    work = Work(6 * N * D * Fe, size * (2 * op_case.tokens * D + hit * 3 * Fe * D))
    problem = OpProblem(op_case, inputs, loop, work)
    record(
        op_case,
        {
            "dense": problem.dense(
                _dense,
                x=inputs["x"],
                gate_up_proj=normal(1, 2 * K * Fe, D, like=like, dtype=dtype, seed=1)[0],
                down_proj=normal(1, D, K * Fe, like=like, dtype=dtype, seed=2)[0],
            ),
            "looped": problem.provider("looped", loop),
            "transformers-eager": _transformers(problem, layer, routed, "eager"),
            "transformers-grouped_mm": _transformers(problem, layer, routed, "grouped_mm"),
            **problem.ours(
                "moe_mlp",
                lambda x, gate_up_proj, down_proj, scores: moe_mlp(
                    x, gate_up_proj, down_proj, routed.ids, scores
                ),
            ),
        },
        problem.work,
    )


def _dense(x, gate_up_proj, down_proj):
    gate, up = (x @ gate_up_proj.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down_proj.T


def _transformers(
    problem: OpProblem, layer: Layer, routed: Routed, implementation: str
) -> Provider:
    def provider():
        try:
            import transformers.integrations.moe  # noqa: F401
            from transformers import MixtralConfig
            from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        except ImportError as error:
            raise UnavailableError(f"transformers does not import: {error}") from error
        config = MixtralConfig(
            hidden_size=layer.D, intermediate_size=layer.F, num_local_experts=layer.E
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = MixtralExperts(config)
        ids = routed.ids.long()

        def run(x, gate_up_proj, down_proj, scores):
            weights = {"gate_up_proj": gate_up_proj, "down_proj": down_proj}
            return functional_call(experts, weights, (x, ids, scores.to(x.dtype)))

        return problem.provider(f"transformers-{implementation}", run)()

    return provider
