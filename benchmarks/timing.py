"""Interleaved timing of several functions, so that slow seconds of the machine affect all."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

MIN_SAMPLE_SECONDS = 1e-3
MAX_CALLS_A_SAMPLE = 64
SLOW, SLOW_EVERY = 6, 4
"""A function that takes `SLOW` times as long as the anchor runs in every `SLOW_EVERY`-th round."""
MIN_ROUNDS = 11
FEWEST_SAMPLES = math.ceil(MIN_ROUNDS / SLOW_EVERY)


@dataclass(frozen=True)
class Timing:
    """Figures of one provider.

    Attributes:
        seconds: median of one call.
        ratio: median over rounds of its time divided by the anchor's in the same round.
        noise: half the width of the 95 % interval of `ratio`, divided by `ratio`.
    """

    seconds: float
    ratio: float
    noise: float


def time_in_turns(
    functions: Mapping[str, Callable[[], float | None]],
    anchor: str,
    device: torch.device,
    *,
    seconds: float,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = 400,
) -> tuple[dict[str, Timing], int]:
    """Times every function once per round, in rotating order.

    A sample of a short function is the mean of several consecutive calls. GPUs are timed by events.

    Args:
        functions: functions by name. If one returns a number, this is its own time in seconds.
        anchor: name of the function that ratios refer to.
        device: device to synchronise with before and after each sample.
        seconds: approximate total time of all rounds.
        min_rounds: minimum number of rounds, regardless of their time.
        max_rounds: maximum number of rounds.

    Returns:
        Figures by name, and the number of rounds.
    """
    once = {name: seconds_of_a_call(function, device) for name, function in functions.items()}
    calls = {
        name: max(1, min(MAX_CALLS_A_SAMPLE, math.ceil(MIN_SAMPLE_SECONDS / max(one, 1e-9))))
        for name, one in once.items()
    }
    samples: dict[str, dict[int, float]] = {name: {} for name in functions}
    stop = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() < stop):
        names = [n for n in once if once[n] < SLOW * once[anchor] or rounds % SLOW_EVERY == 0]
        shift = rounds % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name][rounds] = _sample(functions[name], calls[name], device)
        rounds += 1
    timings = {}
    for name, own in samples.items():
        ratios = [own[index] / samples[anchor][index] for index in own]
        ratio = statistics.median(ratios)
        timings[name] = Timing(statistics.median(own.values()), ratio, noise_of_median(ratios))
    return timings, rounds


def noise_of_median(values: list[float]) -> float:
    """Returns half the width of the median's 95 % interval (order statistics) over the median."""
    ordered, n = sorted(values), len(values)
    reach = 0.98 * math.sqrt(n)
    low, high = math.floor((n - 1) / 2 - reach), math.ceil((n - 1) / 2 + reach)
    return (ordered[min(high, n - 1)] - ordered[max(low, 0)]) / 2 / statistics.median(ordered)


def seconds_of_a_call(function: Callable[[], float | None], device: torch.device) -> float:
    """Seconds of one warm call; calls the function three times."""
    function()
    return min(_sample(function, 1, device) for _ in range(2))


def _sample(function: Callable[[], float | None], calls: int, device: torch.device) -> float:
    """Mean seconds of one call."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3 / calls
    timed_itself = []
    begin = time.perf_counter()
    for _ in range(calls):
        if (own := function()) is not None:
            timed_itself.append(own)
    elapsed = time.perf_counter() - begin
    return statistics.mean(timed_itself) if timed_itself else elapsed / calls
