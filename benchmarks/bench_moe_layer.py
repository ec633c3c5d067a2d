"""The whole layer, router included, against a dense FFN, the published loop and transformers."""

from .problem import problems_of
from .providers import layer_providers


def bench_moe_layer(record, layer_case, device, dtype):
    problems = problems_of(layer_case, device, dtype)
    record(layer_case, layer_providers(problems), problems[0].work)
