"""Checks, times and records all providers of one row."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from .candidates import Candidate, Provider, UnavailableError, Work
from .history import Row
from .limits import Limits, name_of
from .memory import peak_extra_bytes, saved_bytes
from .shapes import Case
from .timing import Timing, time_in_turns

NOISY = 0.07
"""Noise of our ratio above which a row is measured again."""
RERUNS = 3
SLOW_HOOK = "UNIMOE_BENCH_SLOW"
"""Environment variable `<benchmark>:<share>`: makes `ours` wait for that share of its time, so that
anybody can see a regression being caught."""


@dataclass
class Recorder:
    """Measures rows one after the other.

    Attributes:
        device: where providers run.
        dtype: of their inputs.
        limits: of the machine.
        baseline: rows of the last committed result, by key.
        seconds: time spent on the rounds of a row.
        rows: what was measured.
    """

    device: torch.device
    dtype: torch.dtype
    limits: Limits
    baseline: Mapping[str, Row]
    seconds: float = 1.5
    rows: list[Row] = field(default_factory=list)

    def measure(
        self, benchmark: str, case: Case, providers: Mapping[str, Provider], work: Work
    ) -> tuple[Row, Callable[[], float | None]]:
        """Checks every provider, then times all that run in turns.

        A row whose ratio is noisy, or slower than its baseline allows, is measured again, up to
        three times, and the measurement with the lowest ratio of ours is kept: noise comes and
        goes, a slower operator stays.

        Returns:
            The row, and what was timed as ours.

        Raises:
            AssertionError: if an answer is wrong; nothing is timed then.
        """
        candidates, unavailable = checked(providers)
        functions = {name: candidate.run for name, candidate in candidates.items()}
        anchor = next(iter(functions))
        functions["ours"] = _slowed(functions["ours"], benchmark)
        key = f"{benchmark}[{case}]"
        best: tuple[dict[str, Timing], int] | None = None
        for attempt in range(1 + RERUNS):
            timings, rounds = time_in_turns(
                functions, anchor, self.device, seconds=self.seconds * (1 + attempt)
            )
            quiet = timings["ours"].noise <= NOISY
            if best is None or _better(timings["ours"], best[0]["ours"]):
                best = timings, rounds
            if quiet and not is_slower(best[0]["ours"], self.baseline.get(key)):
                break
        row = self._row(key, best[0], best[1], candidates, work)
        row |= {
            "benchmark": benchmark,
            "case": case._asdict(),
            "anchor": anchor,
            "unavailable": unavailable,
        }
        self.rows.append(row)
        return row, functions["ours"]

    def _row(
        self,
        key: str,
        timings: dict[str, Timing],
        rounds: int,
        candidates: Mapping[str, Candidate],
        work: Work,
    ) -> Row:
        least = self.limits.least_seconds(work.flops, work.bytes, self.dtype)
        peak = self.limits.flops.get(name_of(self.dtype), 0)
        by_memory = not work.flops or (
            peak and self.limits.read and work.bytes / self.limits.read > work.flops / peak
        )
        amount = work.bytes if by_memory else work.flops
        figures = {}
        for name, timing in timings.items():
            candidate = candidates[name]
            figures[name] = {
                "median_ms": 1e3 * timing.seconds,
                "rate": amount / timing.seconds / 1e9,
                "share_of_limit": least / timing.seconds if least else None,
                "ratio": timing.ratio,
                "noise": timing.noise,
            }
            if candidate.in_process:
                figures[name]["peak_extra_bytes"] = peak_extra_bytes(candidate.run, self.device)
            if candidate.forward is not None:
                figures[name]["saved_bytes"] = saved_bytes(candidate.forward, candidate.weights)
        return {
            "key": key,
            "dtype": name_of(self.dtype),
            "unit": "GB/s" if by_memory else "GFLOP/s",
            "rounds": rounds,
            "providers": figures,
        }


def checked(providers: Mapping[str, Provider]) -> tuple[dict[str, Candidate], dict[str, str]]:
    """Makes and checks all candidates that run here; the others' reasons come second."""
    candidates: dict[str, Candidate] = {}
    unavailable: dict[str, str] = {}
    for name, provider in providers.items():
        try:
            candidate = provider()
            if candidate.check is not None:
                candidate.check()
            candidates[name] = candidate
        except UnavailableError as error:
            unavailable[name] = str(error)
        except torch.OutOfMemoryError:
            unavailable[name] = "out of memory"
    return candidates, unavailable


def is_slower(ours: Timing, baseline: Row | None) -> bool:
    """Whether our ratio is beyond what the noise of both runs explains."""
    if baseline is None or "ours" not in baseline["providers"]:
        return False
    before = baseline["providers"]["ours"]
    return ours.ratio > before["ratio"] * (1 + tolerance(ours.noise, before["noise"]))


def tolerance(noise: float, noise_before: float) -> float:
    """Relative change of a ratio that is no regression: 8 %, or the noise of both runs.

    Each is counted up to `NOISY` at most, so that a slowdown of 15 % is always beyond it.
    """
    return max(0.08, min(noise, NOISY) + min(noise_before, NOISY))


def _better(ours: Timing, than: Timing) -> bool:
    if (ours.noise <= NOISY) != (than.noise <= NOISY):
        return ours.noise <= NOISY
    return ours.ratio < than.ratio


def _slowed(function, benchmark: str):
    name, _, share = os.environ.get(SLOW_HOOK, "").partition(":")
    if name != benchmark:
        return function

    def slow():
        start = time.perf_counter()
        function()
        wait = float(share) * (time.perf_counter() - start)
        stop = time.perf_counter() + wait
        while time.perf_counter() < stop:
            time.sleep(0)

    return slow
