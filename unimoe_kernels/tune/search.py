"""Search for the fastest tile of each problem."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from unimoe_kernels._triton.launch import Device, interpreted
from unimoe_kernels._triton.problem import Problem, Tile
from unimoe_kernels._triton.tiles import analytic
from unimoe_kernels.testing import relative_error
from unimoe_kernels.tune.candidates import neighbours
from unimoe_kernels.tune.cases import Case
from unimoe_kernels.tune.matmuls import Matmul
from unimoe_kernels.tune.record import Record

Timer = Callable[[Sequence[Callable[[], object]]], list[float]]
STEPS = 3  # from a tile to the best of its neighbours
MIN_GAIN = 0.02  # smaller gains do not justify an entry
# One unit in the last place of 16-bit results, and what long sums lose of wider ones.
MAX_ERRORS = {
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
    torch.float32: 2e-5,
    torch.float64: 1e-12,
}


class Outcome(NamedTuple):
    """Result of measuring a problem: tiles and their times in seconds."""

    analytic: Tile
    analytic_seconds: float | None
    tile: Tile
    seconds: float


class Finish(NamedTuple):
    """How a run ended.

    Attributes:
        complete: Whether all problems were measured within the time limit.
        broken: Problems for which no tile gave correct results.
    """

    complete: bool
    broken: list[Case]


class Reporter(Protocol):
    """Receives progress reports."""

    def measured(self, case: Case, outcome: Outcome) -> None:
        """Called when a problem is finished."""

    def trying(self, case: Case, number: int) -> None:
        """Called with the number of tiles of a problem that have run."""

    def skipped(self, case: Case, reason: str) -> None:
        """Called when a problem could not be measured, or was measured before."""


class DeviceLostError(RuntimeError):
    """A kernel broke the process's CUDA context: only a new process can continue."""


def tune(
    cases: Sequence[Case],
    device: Device,
    build: Callable[[Case], Matmul],
    timer: Timer,
    record: Record,
    clock: Callable[[], float],
    seconds: float,
    report: Reporter,
    jobs: int = 1,
) -> Finish:
    """Measures problems one by one until all are done or the time limit is reached.

    Args:
        cases: Problems in order of importance.
        device: Device that tiles must fit.
        build: Draws the inputs of a case.
        timer: Returns the time of each of several functions, in seconds.
        record: Output record; problems that it already has are skipped.
        clock: Returns the current time in seconds.
        seconds: Time limit, after which no problem and no step within one is started.
        report: Receives progress reports.
        jobs: Number of tiles to compile in parallel.

    Returns:
        Whether all problems were measured, and those that could not be.

    Raises:
        DeviceLostError: If a kernel broke the GPU's state. The tile is recorded, so that the next
            run skips it.
    """
    stop = clock() + seconds
    broken: list[Case] = []
    for case in cases:
        if record.has(case.problem, analytic(case.problem, device)):
            report.skipped(case, "measured already")
            continue
        if clock() >= stop:
            return Finish(False, broken)
        try:
            search = Search(case, build(case), device, timer, record, report, jobs)
        except torch.OutOfMemoryError:
            report.skipped(case, "its tensors do not fit into the memory of the device")
            continue
        outcome = search.run(lambda: clock() >= stop)
        if outcome is None:
            broken.append(case)
            report.skipped(case, "no tile ran and gave the right numbers")
            continue
        record.add(case.problem, *outcome)
        report.measured(case, outcome)
    return Finish(True, broken)


class Search:
    """The search for the fastest tile of one problem."""

    def __init__(
        self,
        case: Case,
        matmul: Matmul,
        device: Device,
        timer: Timer,
        record: Record,
        report: Reporter,
        jobs: int = 1,
    ):
        self._case, self._matmul, self._device, self._timer = case, matmul, device, timer
        self._record, self._report, self._jobs = record, report, jobs
        self._problem: Problem = case.problem
        self._tried: set[Tile] = record.failed(self._problem)
        self._ran = 0
        self._first: tuple[Tensor, ...] | None = None
        self._own = analytic(self._problem, device)
        with full_precision():
            self._exact = [(own, matmul.exact(own)) for own in matmul.some_experts()]

    def run(self, is_over: Callable[[], bool]) -> Outcome | None:
        """Moves from the analytic tile to faster neighbours; returns None if no tile runs."""
        anchor = self._working([self._own])
        # If descriptors fail on a GPU, start from the analytic tile with pointers.
        best = self._own if anchor else self._own._replace(descriptors=False)
        contenders = anchor or self._working([best])
        for _ in range(STEPS):
            contenders = contenders + self._working(neighbours(self._problem, best, self._device))
            if not contenders:
                return None
            times = dict(zip(contenders, self._time(contenders), strict=True))
            fastest = min(times, key=times.__getitem__)
            if fastest == best or is_over():
                best = fastest
                break
            best = fastest
            contenders = list(dict.fromkeys([*anchor, best]))
        return self._decide(best, bool(anchor))

    def _decide(self, best: Tile, has_anchor: bool) -> Outcome:
        """Times the winner against the analytic tile again, because the best of many is biased."""
        if not has_anchor:
            return Outcome(self._own, None, best, self._time([best])[0])
        if best == self._own:
            seconds = self._time([best])[0]
            return Outcome(best, seconds, best, seconds)
        own, seconds = self._time([self._own, best])
        if seconds > (1 - MIN_GAIN) * own:
            return Outcome(self._own, own, self._own, own)
        return Outcome(self._own, own, best, seconds)

    def _time(self, tiles: list[Tile]) -> list[float]:
        return self._timer([lambda tile=tile: self._matmul.launch(tile) for tile in tiles])

    def _working(self, tiles: list[Tile]) -> list[Tile]:
        """Returns those tiles that were not tried before, run, and give correct results."""
        fresh = [tile for tile in tiles if tile not in self._tried]
        self._tried.update(fresh)
        compile_all(self._matmul, fresh, self._jobs)
        return [tile for tile in fresh if self._works(tile)]

    def _works(self, tile: Tile) -> bool:
        self._record.begin(self._problem, tile)
        error = ""
        try:
            outputs = self._matmul.launch(tile)
            if outputs[0].is_cuda:
                torch.cuda.synchronize(outputs[0].device)
            error = self._describe_error(outputs)
        except torch.OutOfMemoryError:
            error = "out of memory"
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
            if _is_lost(problem):
                self._record.end(self._problem, tile, error)
                raise DeviceLostError(f"{self._case} with {tile}: {error}") from problem
        self._record.end(self._problem, tile, error)
        self._ran += 1
        self._report.trying(self._case, self._ran)
        return not error

    def _describe_error(self, outputs: tuple[Tensor, ...]) -> str:
        """Compares two experts with exact results, and all outputs with the first tile that ran."""
        pairs = [
            pair
            for own, exact in self._exact
            for pair in zip(self._matmul.part(outputs, own), exact, strict=True)
        ]
        errors = [relative_error(*pair) for pair in pairs]
        if self._first is not None:
            errors += [_distance(*pair) for pair in zip(outputs, self._first, strict=True)]
        limit = MAX_ERRORS[self._problem.dtype]
        # Written so that NaN fails.
        wrong = [error for error in errors if not error <= limit]
        if wrong:
            return f"wrong numbers: relative error {wrong[0]:.2g}, at most {limit:.2g}"
        self._first = outputs if self._first is None else self._first
        return ""


def _distance(a: Tensor, b: Tensor) -> float:
    """Returns the relative difference, without a copy in higher precision."""
    size = torch.linalg.vector_norm
    dtype = torch.promote_types(a.dtype, torch.float32)
    return float(size(a - b, dtype=dtype) / size(b, dtype=dtype))


def compile_all(matmul: Matmul, tiles: list[Tile], jobs: int) -> None:
    """Compiles tiles in parallel; compile errors are raised when a tile is launched."""
    if jobs < 2 or len(tiles) < 2 or interpreted():
        return
    with (
        ThreadPoolExecutor(jobs) as pool,
        compiling_only(),
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        for tile in tiles:
            with contextlib.suppress(Exception):
                matmul.launch(tile)


@contextlib.contextmanager
def compiling_only() -> Iterator[None]:
    """Makes launches compile their kernels without running them."""
    run = JITFunction.run
    JITFunction.run = lambda *args, **options: run(*args, **(options | {"warmup": True}))
    try:
        yield
    finally:
        JITFunction.run = run


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Disables TF32 in the results that tiles are compared with."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _is_lost(problem: Exception) -> bool:
    """Returns whether later calls will fail as well, such as after an illegal memory access."""
    sticky = ("CUDA error", "illegal", "misaligned", "launch failure", "device-side")
    text = str(problem)
    return isinstance(problem, RuntimeError) and any(word in text for word in sticky)
