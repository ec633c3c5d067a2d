"""Checks, times and records all providers of one row."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .candidates import Candidate, Provider, UnavailableError, Work
from .history import Row
from .limits import Limits, name_of
from .memory import peak_extra_bytes, saved_bytes
from .shapes import Case
from .time_limit import within
from .timing import FEWEST_SAMPLES, Timing, seconds_of_a_call, time_in_turns

SLOW_HOOK = "UNIMOE_BENCH_SLOW"
"""Environment variable `<benchmark>:<share>`: slows `ours` down by this share of its time, to test
the detection of regressions."""


class LimitsOfTime(NamedTuple):
    """Time limits of a peer; one that exceeds them is omitted from the row, with the reason.

    Attributes:
        ready: limit in seconds for creating and checking it, or None.
        rounds: limit in seconds for the minimum number of rounds, or None.
    """

    ready: float | None = None
    rounds: float | None = None


NO_LIMITS = LimitsOfTime()
GPU_LIMITS = LimitsOfTime(ready=20, rounds=30)
"""On a GPU: a peer that autotunes for minutes must not use up the time of the table."""


@dataclass
class Recorder:
    """Measures rows one after the other.

    Attributes:
        device: device on which providers run.
        limits: limits of the machine.
        seconds: time spent on the rounds of a row.
        limits_of_time: time limits of providers.
        rows: the measured rows.
    """

    device: torch.device
    limits: Limits
    seconds: float = 1.5
    limits_of_time: LimitsOfTime = NO_LIMITS
    rows: list[Row] = field(default_factory=list)

    def measure(
        self,
        benchmark: str,
        case: Case,
        dtype: torch.dtype,
        providers: Mapping[str, Provider],
        work: Work,
    ) -> tuple[Row, Callable[[], float | None]]:
        """Checks every provider, then times those that run, interleaved.

        Args:
            benchmark: name of the operator, `moe_layer` or `model`.
            case: the case.
            dtype: dtype of the inputs.
            providers: the providers, the anchor first.
            work: the minimum work.

        Returns:
            The row, and the function timed as ours.

        Raises:
            AssertionError: If an output is wrong; nothing is timed in this case.
        """
        candidates, unavailable = checked(providers, self.limits_of_time.ready)
        functions = {name: candidate.run for name, candidate in candidates.items()}
        anchor = next(iter(functions))
        for name in functions.keys() - {anchor, "ours"}:
            if reason := self._why_too_slow(functions[name]):
                unavailable[name] = reason
                del functions[name], candidates[name]
        functions["ours"] = slowed(functions["ours"], benchmark)
        timings, rounds = time_in_turns(functions, anchor, self.device, seconds=self.seconds)
        row = self._row(f"{benchmark}[{case}]", dtype, timings, rounds, candidates, work)
        row |= {
            "benchmark": benchmark,
            "case": case._asdict(),
            "anchor": anchor,
            "visits": [timings["ours"].ratio],
            "unavailable": unavailable,
        }
        self.rows.append(row)
        return row, functions["ours"]

    def _why_too_slow(self, function: Callable[[], float | None]) -> str:
        ready, rounds = self.limits_of_time
        if ready is None or rounds is None:
            return ""
        try:
            with within(ready):
                seconds = FEWEST_SAMPLES * seconds_of_a_call(function, self.device)
        except UnavailableError as error:
            return str(error)
        if seconds <= rounds:
            return ""
        return f"its part of the row would take {seconds:.0f} s, more than {rounds:g} s"

    def _row(
        self,
        key: str,
        dtype: torch.dtype,
        timings: dict[str, Timing],
        rounds: int,
        candidates: Mapping[str, Candidate],
        work: Work,
    ) -> Row:
        peak = self.limits.flops.get(name_of(dtype), 0)
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
                "ratio": timing.ratio,
                "noise": timing.noise,
            }
            if candidate.in_process:
                figures[name]["peak_extra_bytes"] = peak_extra_bytes(candidate.run, self.device)
            if candidate.forward is not None:
                figures[name]["saved_bytes"] = saved_bytes(candidate.forward, candidate.weights)
        row = {
            "key": key,
            "dtype": name_of(dtype),
            "unit": "GB/s" if by_memory else "GFLOP/s",
            "work": work._asdict(),
            "rounds": rounds,
            "providers": figures,
        }
        set_shares(row, self.limits)
        return row


def set_shares(row: Row, limits: Limits) -> None:
    """Sets each provider's share of the machine's limit."""
    least = limits.least_seconds(row["work"]["flops"], row["work"]["bytes"], row["dtype"])
    for figures in row["providers"].values():
        figures["share_of_limit"] = least / (figures["median_ms"] / 1e3) if least else None


def checked(
    providers: Mapping[str, Provider], ready: float | None = None
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """Creates and checks candidates; returns those that run here, and the others' reasons.

    Args:
        providers: providers by name.
        ready: time limit in seconds of each except `ours`, or None.
    """
    candidates: dict[str, Candidate] = {}
    unavailable: dict[str, str] = {}
    for name, provider in providers.items():
        try:
            with within(None if name == "ours" else ready):
                candidate = provider()
                if candidate.check is not None:
                    candidate.check()
            candidates[name] = candidate
        except UnavailableError as error:
            unavailable[name] = str(error)
        except torch.OutOfMemoryError:
            unavailable[name] = "out of memory"
    return candidates, unavailable


def revisited(
    benchmark: str, providers: Mapping[str, Provider], anchor: str, device: torch.device
) -> float:
    """Returns our ratio to the anchor, timed without other providers."""
    functions = {anchor: providers[anchor]().run}
    functions["ours"] = slowed(providers["ours"]().run, benchmark)
    timings, _ = time_in_turns(functions, anchor, device, seconds=0.8, min_rounds=7)
    return timings["ours"].ratio


def slowed(function, benchmark: str):
    """Returns the function, slowed down if the environment variable requests it."""
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
