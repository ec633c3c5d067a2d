import argparse
import datetime
import os
import shlex
from pathlib import Path

# Read by torch's profiler, which counts memory, when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")

import pytest
import torch

from . import history, plots, shapes, tables
from .compare import NOISY, Change, compare, is_noisy, is_slower
from .limits import measure_limits
from .memory import keep_freed_memory
from .recorder import Recorder, checked, revisited
from .visits import VisitFile, visit

STATE = pytest.StashKey["Run"]()
SETS_OF = {
    "layer_case": "layer",
    "op_case": "operator",
    "movement_case": "movement",
    "sort_case": "movement",
}
RERUNS = 3
"""How often a row is visited again that is noisy or looks slower than before."""


class Run:
    """What one call of pytest measures."""

    def __init__(self, config):
        chosen = config.getoption("shapes")
        self.device = _device()
        self.shapes = chosen or ("goals" if self.device.type == "cuda" else "small")
        self.smoke = config.getoption("smoke")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.expected = set()
        self.recorder = self.file = self.source = None
        self.changes: list[Change] = []
        self.config = config
        asked = config.getoption("visit")
        self.visit = VisitFile(asked) if asked else None

    def begin(self):
        """Measures the machine; done at the first row, so that collecting costs nothing."""
        if self.recorder is not None:
            return
        source, baseline = history.committed_rows(history.machine_class(self.device))
        self.source, self.baseline = source, baseline
        keep_freed_memory()
        limits = measure_limits(self.device)
        self.recorder = Recorder(self.device, self.dtype, limits)
        if self.config.getoption("save"):
            head = {
                "commit": history.commit(),
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "command": shlex.join(["pytest", *map(str, self.config.invocation_params.args)]),
                "shapes": self.shapes,
                "machine": history.machine(self.device),
                "limits": vars(limits),
            }
            self.file = history.ResultsFile(history.results_path(self.device), head)

    def finish(self, say):
        """Visits again the rows that need it, and compares all of them."""
        compares, saves = self.config.getoption("compare"), self.file is not None
        # Places in memory and neighbours are a CPU's trouble; the GPU targets have to be quick.
        thorough = saves and self.device.type == "cpu"
        rows = self._rows()
        for _ in range(RERUNS if compares or saves else 0):
            again = [
                row
                for key, row in rows.items()
                if is_noisy(row, NOISY / 2 if thorough else NOISY)
                or (thorough and len(row["visits"]) == 1)
                or (compares and is_slower(row, self.baseline.get(key)))
            ]
            if not again:
                break
            visit(again, self.shapes, say)
            if saves:
                for row in again:
                    self.file.add(row)
        self.changes = compare(rows.values(), self.baseline, sorted(self._expected_rows()))

    def _rows(self):
        """What this run measured, and what an earlier one left in the same file."""
        rows = {row["key"]: row for row in self.recorder.rows}
        if self.file is not None:
            expected = self._expected_rows()
            rows = {key: self.file.rows[key] for key in self.file.rows if key in expected} | rows
        return rows

    def _expected_rows(self):
        expected = set(self.expected)
        narrowed = self.config.option.keyword or self.config.option.markexpr
        whole = all(arg.rstrip("/").endswith("benchmarks") for arg in self.config.args)
        if self.baseline and whole and not narrowed and ":" not in self.shapes:
            names = {str(case) for case in _cases_of(self.shapes)}
            expected |= {k for k in self.baseline if k.partition("[")[2][:-1] in names}
        return expected


def pytest_addoption(parser):
    group = parser.getgroup("unimoe benchmarks")
    group.addoption(
        "--shapes",
        metavar="SET[:TEXT]",
        help=f"one of {', '.join(shapes.SETS)} (default: goals on a GPU, small on a CPU), and"
        " optionally a text that the name of a case must hold, such as small:mixtral",
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
        help="write benchmarks/results/<machine class>-<date>.json, row by row, and its pictures;"
        " rows of the same commit that it holds already are not measured again",
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
            cases = _chosen(run.shapes, name)
            if fixture == "sort_case":
                cases = [case for case in cases if case.mode == "forward"]
            metafunc.parametrize(fixture, [pytest.param(case, id=str(case)) for case in cases])
    if "model_case" in metafunc.fixturenames:
        name, _, text = run.shapes.partition(":")
        cases = [case for case in shapes.MODEL_CASES[shapes.SETS[name].model] if text in str(case)]
        metafunc.parametrize("model_case", [pytest.param(case, id=str(case)) for case in cases])


def pytest_collection_modifyitems(config, items):
    run = config.stash[STATE]
    if run.visit is not None:
        items[:] = [item for item in items if _key(item) in run.visit.anchors]


def pytest_collection_finish(session):
    run = session.config.stash[STATE]
    run.expected = {_key(item) for item in session.items if hasattr(item, "callspec")}


def _cases_of(chosen):
    name, _, text = chosen.partition(":")
    if name not in shapes.SETS:
        raise pytest.UsageError(f"--shapes ({name}) must be one of {', '.join(shapes.SETS)}")
    cases = shapes.every_case(name)
    if not any(text in str(case) for case in cases):
        raise pytest.UsageError(f"--shapes ({chosen}): no case of {name} holds {text!r}")
    return cases


def _chosen(chosen, kind):
    _cases_of(chosen)
    name, _, text = chosen.partition(":")
    return [case for case in getattr(shapes.SETS[name], kind) if text in str(case)]


def _key(item):
    case = next(iter(item.callspec.params.values()))
    return f"{item.originalname.removeprefix('bench_')}[{case}]"


def _device():
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(os.environ.get("UNIMOE_BENCH_DEVICE", default))


@pytest.fixture(scope="session")
def device(pytestconfig):
    return pytestconfig.stash[STATE].device


@pytest.fixture(scope="session")
def dtype(pytestconfig):
    return pytestconfig.stash[STATE].dtype


@pytest.fixture
def record(benchmark, request, pytestconfig):
    """Checks all providers of a row, times them in turns and keeps the row."""
    run = pytestconfig.stash[STATE]
    name = request.node.originalname.removeprefix("bench_")

    def checks_times_and_keeps(case, providers, work, *, cold=False):
        if run.visit is not None:
            keep_freed_memory()
            key = _key(request.node)
            anchor = run.visit.anchors[key]
            run.visit.add(key, revisited(name, providers, anchor, run.device, cold=cold))
            return
        if run.smoke or benchmark.disabled:
            candidates, _ = checked(providers)
            benchmark(candidates["ours"].run)
            return
        run.begin()
        if run.file is not None and _key(request.node) in run.file.rows:
            pytest.skip("measured already at this commit; its row is in the results file")
        row, ours = run.recorder.measure(name, case, providers, work, cold=cold)
        benchmark.extra_info.update(row)
        if run.file is not None:
            run.file.add(row)
        # The fixture times one function; its own row is ours alone, the rest is in extra_info.
        benchmark.pedantic(ours, rounds=3, warmup_rounds=1)

    return checks_times_and_keeps


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
        plots.draw(history.results_path(run.device))


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
