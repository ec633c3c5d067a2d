"""The whole layer, router included, against a dense FFN, the published loop and transformers."""

from .problem import Problem
from .providers import layer_providers
from .shapes import COLD_TOKENS


def bench_moe_layer(record, layer_case, device, dtype):
    problem = Problem(layer_case, device, dtype)
    cold = layer_case.tokens <= COLD_TOKENS
    record(layer_case, layer_providers(problem), problem.work, cold=cold)
