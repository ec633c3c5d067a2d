"""One call of pytest: which cases it measures, and comparison and output of its rows."""

import datetime
import os
import shlex
import time

import pytest
import torch

from unimoe_model.precision import multiplies_bf16

from . import history, shapes
from .compare import NOISY, Change, compare, is_noisy, is_slower
from .limits import best_of, measure_limits
from .memory import give_back_freed_memory, keep_freed_memory
from .recorder import GPU_LIMITS, NO_LIMITS, Recorder, set_shares
from .remote import stop_workers
from .visits import VisitFile, visit

RERUNS = (4, 8, 16)
"""Numbers of new processes that visit a row that is noisy or looks slower, in each round.

They increase: fewer rows remain in later rounds, and a busy minute of the machine is outvoted.
"""


class Run:
    """The measurements of one call of pytest."""

    def __init__(self, config):
        chosen = config.getoption("shapes")
        self.device = _device()
        self.shapes = chosen or ("goals" if self.device.type == "cuda" else "small")
        self.smoke = config.getoption("smoke")
        # Options are checked later, where pytest reports errors.
        if (chosen := shapes.SETS.get(self.shapes.partition(":")[0])) and chosen.threads:
            torch.set_num_threads(chosen.threads)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.expected = set()
        self.recorder = self.file = self.source = None
        self.changes: list[Change] = []
        self.config = config
        self.limits_of_time = GPU_LIMITS if self.device.type == "cuda" else NO_LIMITS
        minutes = config.getoption("minutes")
        self.stop = None if minutes is None else time.monotonic() + 60 * minutes
        asked = config.getoption("visit")
        self.visit = VisitFile(asked) if asked else None

    def dtype_of(self, case):
        """Returns the dtype of a case: its own, or the default of the device."""
        return getattr(torch, case.dtype) if case.dtype else self.dtype

    def check_time(self):
        """Skips a row that would start after the minutes that the run was given."""
        if self.stop is not None and time.monotonic() > self.stop:
            pytest.skip("the time limit was reached; the same command resumes")

    def begin(self):
        """Measures the machine; called at the first row, so that collection takes no time."""
        if self.recorder is not None:
            return
        source, baseline = history.committed_rows(history.machine_class(self.device))
        self.source, self.baseline = source, baseline
        keep_freed_memory()
        limits = measure_limits(self.device)
        self.recorder = Recorder(self.device, limits, limits_of_time=self.limits_of_time)
        if self.config.getoption("save"):
            head = {
                "commit": history.commit(),
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "commands": [shlex.join(["pytest", *map(str, self.config.invocation_params.args)])],
                "machine": history.machine(self.device),
                "limits": vars(limits),
            }
            self.file = history.ResultsFile(self.results_path(), head)

    def results_path(self):
        """Where rows of the chosen set are kept."""
        return history.results_path(self.device, self.shapes.partition(":")[0])

    def finish(self, say):
        """Visits again the rows that need it, and compares all of them."""
        compares, saves = self.config.getoption("compare"), self.file is not None
        # Memory placement and other load matter on CPUs only, and the GPU targets must be quick.
        thorough = saves and self.device.type == "cpu"
        rows = self._rows()
        # Visits need as much memory as this process did.
        stop_workers()
        give_back_freed_memory()
        for processes in RERUNS if compares or saves else ():
            again = [
                row
                for key, row in rows.items()
                if is_noisy(row, NOISY / 2 if thorough else NOISY)
                or (thorough and len(row["visits"]) == 1)
                or (compares and is_slower(row, self.baseline.get(key)))
            ]
            if not again:
                break
            visit(again, processes, self.shapes, say)
            if saves:
                for row in again:
                    self.file.add(row)
        self._measure_limits_again(rows.values())
        self.changes = compare(rows.values(), self.baseline, sorted(self._expected_rows()))

    def _measure_limits_again(self, rows):
        """Measures the limits again, because other load at the start may have ended."""
        held = [self.file.limits] if self.file is not None else []
        limits = best_of(*held, self.recorder.limits, measure_limits(self.device))
        self.recorder.limits = limits
        for row in rows:
            set_shares(row, limits)
        if self.file is not None:
            self.file.finish(limits, rows)

    def _rows(self):
        """Returns the rows of this run and those of an earlier one in the same file."""
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
            absent = () if multiplies_bf16(self.device) else ("bfloat16",)
            names = {str(case) for case in _cases_of(self.shapes) if case.dtype not in absent}
            expected |= {k for k in self.baseline if k.partition("[")[2][:-1] in names}
        return expected


def _cases_of(chosen):
    name, _, text = chosen.partition(":")
    if name not in shapes.SETS:
        raise pytest.UsageError(f"--shapes ({name}) must be one of {', '.join(shapes.SETS)}")
    cases = shapes.every_case(name)
    if not any(text in str(case) for case in cases):
        raise pytest.UsageError(f"--shapes ({chosen}): no case of {name} contains {text!r}")
    return cases


def chosen_cases(chosen, kind):
    """Returns the cases of one kind, a field of `ShapeSet`, that the option `--shapes` selects.

    Rows in bfloat16 are omitted on devices without instructions for it, where peers emulate it and
    a comparison is not meaningful. Those of the smoke set are still checked.
    """
    _cases_of(chosen)
    name, _, text = chosen.partition(":")
    cases = [case for case in getattr(shapes.SETS[name], kind) if text in str(case)]
    if name == "smoke" or multiplies_bf16(_device()):
        return cases
    return [case for case in cases if case.dtype != "bfloat16"]


def _device():
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(os.environ.get("UNIMOE_BENCH_DEVICE") or default)
