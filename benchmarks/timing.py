"""Medians of several functions timed in turns, so that a slow second of the machine hits all."""

import statistics
import time
from collections.abc import Callable

import torch


def interleaved_medians(
    functions: dict[str, Callable[[], None]],
    device: torch.device,
    *,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 50,
) -> tuple[dict[str, float], int]:
    """Times every function once a round, in an order that rotates.

    Args:
        functions: what to time, by name.
        device: waited for before and after each call.
        seconds: rounds go on for about this long in total.
        min_rounds: at least so many, however long they take.
        max_rounds: at most so many.

    Returns:
        Median seconds by name, and the number of rounds.
    """
    names = list(functions)
    for name in names:
        functions[name]()
    samples = {name: [] for name in names}
    stop = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() < stop):
        shift = rounds % len(names)
        for name in names[shift:] + names[:shift]:
            _wait(device)
            start = time.perf_counter()
            functions[name]()
            _wait(device)
            samples[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: statistics.median(times) for name, times in samples.items()}, rounds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
