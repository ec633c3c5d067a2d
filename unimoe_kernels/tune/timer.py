"""Interleaved timing of functions on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

ROUNDS = 11
FLUSHED_BYTES = 512 * 2**20  # more than any L2 cache, and long enough to hide launches behind


class CudaTimer:
    """Measures medians of single calls, each after overwriting the L2 cache.

    Overwriting takes the GPU longer than the host needs for a launch, so the events enclose only
    the kernels. Each round runs every function once, in a rotating order, so that changes of the
    GPU's clock affect all of them.

    Args:
        device: Device on which the functions run.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, functions: Sequence[Callable[[], object]]) -> list[float]:
        """Returns the seconds of each function."""
        samples: list[list[tuple]] = [[] for _ in functions]
        for function in functions:
            function()
        for turn in range(ROUNDS):
            for index in range(len(functions)):
                chosen = (index + turn) % len(functions)
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._flushed.zero_()
                start.record()
                functions[chosen]()
                end.record()
                samples[chosen].append((start, end))
        torch.cuda.synchronize(self._device)
        return [
            statistics.median(start.elapsed_time(end) / 1e3 for start, end in own)
            for own in samples
        ]
