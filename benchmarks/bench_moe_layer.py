"""The whole layer, router included, against a dense FFN, the published loop and transformers."""

from .problem import Problem
from .providers import PROVIDERS, UnavailableError
from .timing import interleaved_medians


def bench_moe_layer(benchmark, case, device, dtype, results):
    problem = Problem(case, device, dtype)
    run = getattr(problem, case.mode)
    functions, unavailable = {}, {}
    for name, provider in PROVIDERS.items():
        try:
            layer = provider(problem)
        except UnavailableError as error:
            unavailable[name] = str(error)
        else:
            functions[name] = lambda layer=layer: run(layer)

    if benchmark.disabled:
        benchmark(functions["ours"])
        return
    medians, rounds = interleaved_medians(functions, device, seconds=1.0)
    D, F, _, K = problem.layer
    passes = 3 if case.mode == "training" else 1
    flops = 6 * case.tokens * K * D * F * passes
    benchmark.extra_info.update(
        case=case._asdict(),
        layer=problem.layer._asdict(),
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        rounds=rounds,
        median_ms={name: 1e3 * seconds for name, seconds in medians.items()},
        gflops={name: flops / seconds / 1e9 for name, seconds in medians.items()},
        ratio_to_dense={name: seconds / medians["dense"] for name, seconds in medians.items()},
        unavailable=unavailable,
    )
    results.append(benchmark.extra_info)
    # The fixture times one function; its row is ours alone, the comparison is in extra_info.
    benchmark.pedantic(functions["ours"], rounds=3, warmup_rounds=1)
