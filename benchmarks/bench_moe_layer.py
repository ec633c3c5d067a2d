"""The whole layer with its router, compared with a dense FFN, the published loop and peers."""

from .problem import problems_of
from .providers import layer_providers


def bench_moe_layer(record, layer_case, device, dtype):
    problems = problems_of(layer_case, device, dtype)
    record(layer_case, layer_providers(problems), problems[0].work)
