import argparse
import os
from pathlib import Path

# Read when torch is imported, this one by its profiler, which counts memory.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")
# As under make: threads that wait for work must not spin while another provider is timed.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest

from . import history, plots, shapes, tables
from .memory import give_back_freed_memory, keep_freed_memory
from .recorder import checked, revisited
from .remote import forget_cases
from .run import Run, chosen_cases

STATE = pytest.StashKey[Run]()
SETS_OF = {
    "layer_case": "layer",
    "op_case": "operator",
    "movement_case": "movement",
    "sort_case": "movement",
    "lora_case": "lora",
    "quantized_case": "quantized",
    "ranks_case": "ranks",
    "host_case": "host",
    "launch_case": "launch",
}

VALUE = ("moe_layer", "topk_router", "permute", "unpermute", "model", "host")
"""Benchmarks whose rows run first, in case time runs out."""


def pytest_addoption(parser):
    group = parser.getgroup("unimoe benchmarks")
    group.addoption(
        "--shapes",
        metavar="SET[:TEXT]",
        help=f"one of {', '.join(shapes.SETS)} (default: goals on a GPU, small on a CPU), and"
        " optionally a text that the name of a case must contain, such as small:mixtral",
    )
    group.addoption(
        "--smoke", action="store_true", help="the smallest shapes, checked and not timed"
    )
    group.addoption(
        "--compare",
        action="store_true",
        help="fail if a row is slower than in the last committed result of this machine class",
    )
    group.addoption(
        "--save",
        action="store_true",
        help="write benchmarks/results/<machine class>-<date>.json, row by row, and its plots;"
        " rows of the same commit that it already has are not measured again",
    )
    group.addoption(
        "--minutes",
        type=float,
        help="start no row after this many minutes; the most important rows run first, and with"
        " --save the same command resumes",
    )
    group.addoption("--visit", type=Path, help=argparse.SUPPRESS)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if config.getoption("smoke"):
        # pytest-benchmark reads its option when it is configured, after this.
        config.option.benchmark_disable = True
        config.option.shapes = "smoke"
    if not any("--benchmark-columns" in str(arg) for arg in config.invocation_params.args):
        config.option.benchmark_columns = ["median", "rounds"]
    config.stash[STATE] = Run(config)


def pytest_generate_tests(metafunc):
    run = metafunc.config.stash[STATE]
    for fixture, name in SETS_OF.items():
        if fixture in metafunc.fixturenames:
            cases = chosen_cases(run.shapes, name)
            if fixture == "sort_case":
                cases = [case for case in cases if case.mode == "forward"]
            metafunc.parametrize(fixture, [pytest.param(case, id=str(case)) for case in cases])
    if "model_case" in metafunc.fixturenames:
        name, _, text = run.shapes.partition(":")
        cases = [case for case in shapes.MODEL_CASES[shapes.SETS[name].model] if text in str(case)]
        metafunc.parametrize("model_case", [pytest.param(case, id=str(case)) for case in cases])


def pytest_collection_modifyitems(config, items):
    run = config.stash[STATE]
    # A benchmark without cases in the chosen set.
    items[:] = [item for item in items if isinstance(_case(item), shapes.Case)]
    items.sort(key=_value)
    if run.visit is not None:
        items[:] = [item for item in items if _key(item) in run.visit.anchors]


def pytest_collection_finish(session):
    run = session.config.stash[STATE]
    run.expected = {_key(item) for item in session.items if hasattr(item, "callspec")}


def _value(item):
    name = item.originalname.removeprefix("bench_")
    return VALUE.index(name) if name in VALUE else len(VALUE)


def _case(item):
    return next(iter(item.callspec.params.values()))


def _key(item):
    case = _case(item)
    return f"{item.originalname.removeprefix('bench_')}[{case}]"


@pytest.fixture(scope="session")
def device(pytestconfig):
    return pytestconfig.stash[STATE].device


@pytest.fixture
def dtype(request, pytestconfig):
    return pytestconfig.stash[STATE].dtype_of(_case(request.node))


@pytest.fixture
def record(benchmark, request, pytestconfig, dtype):
    """Checks all providers of a row, times them interleaved and stores the row."""
    run = pytestconfig.stash[STATE]
    name = request.node.originalname.removeprefix("bench_")
    forget_cases()
    give_back_freed_memory()

    def checks_times_and_keeps(case, providers, work):
        if run.visit is not None:
            keep_freed_memory()
            key = _key(request.node)
            anchor = run.visit.anchors[key]
            run.visit.add(key, revisited(name, providers, anchor, run.device))
            return
        run.check_time()
        if run.smoke or benchmark.disabled:
            candidates, _ = checked(providers, run.limits_of_time.ready)
            benchmark(candidates["ours"].run)
            return
        run.begin()
        if run.file is not None and _key(request.node) in run.file.rows:
            pytest.skip("already measured at this commit; its row is in the results file")
        row, ours = run.recorder.measure(name, case, dtype, providers, work)
        _print(pytestconfig, tables.row_table(row))
        benchmark.extra_info.update(row)
        if run.file is not None:
            run.file.add(row)
        # The fixture times one function; its own row is ours alone, the rest is in extra_info.
        benchmark.pedantic(ours, rounds=3, warmup_rounds=1)

    return checks_times_and_keeps


def _print(config, lines):
    reporter = config.pluginmanager.getplugin("terminalreporter")
    # What is written while a test runs would be shown if it fails.
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        reporter.ensure_newline()
        for line in lines:
            reporter.write_line(line)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(history.machine(config.stash[STATE].device))


def pytest_sessionfinish(session):
    run = session.config.stash[STATE]
    if run.recorder is None or session.exitstatus not in (0, 1):
        return
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    reporter.ensure_newline()
    run.finish(reporter.write_line)
    if session.config.getoption("compare") and any(change.fails for change in run.changes):
        session.exitstatus = 1
    if run.file is not None:
        plots.draw(run.results_path())


def pytest_terminal_summary(terminalreporter, config):
    run = config.stash[STATE]
    if run.recorder is None:
        return
    write = terminalreporter.write_line
    limits = run.recorder.limits
    terminalreporter.section("limits measured in this run")
    for dtype, rate in limits.flops.items():
        write(f"{dtype:10} {rate / 1e9:10.0f} GFLOP/s")
    write(f"{'read':10} {limits.read / 1e9:10.1f} GB/s")
    write(f"{'copy':10} {limits.copy / 1e9:10.1f} GB/s (read and written)")
    if limits.missing:
        write(limits.missing)
    if run.recorder.rows:
        terminalreporter.section("every provider")
        for row in run.recorder.rows:
            for line in tables.row_table(row):
                write(line)
        reasons = {n: r for row in run.recorder.rows for n, r in row["unavailable"].items()}
        for name, reason in reasons.items():
            write(f"{name} did not run everywhere: {reason}")
        terminalreporter.section("summary")
        for line in tables.summary_table(run.recorder.rows):
            write(line)
    if not run.source:
        wanted = history.machine_class(run.device)
        terminalreporter.section("no committed result of this machine class")
        write(f"--save writes one for {wanted}; commit it to have something to compare with")
        return
    terminalreporter.section(f"changes against {run.source}")
    for change in run.changes:
        write(f"{'FAIL' if change.fails else 'note'}  {change.key}  {change.text}")
    if not run.changes:
        write("none beyond noise")
