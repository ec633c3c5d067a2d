"""Shuffling within windows, so that files are read nearly sequentially."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Shuffle:
    """How the files of a data entry are shuffled.

    Attributes:
        window: number of consecutive samples that are permuted together.
        parts: number of samples per file, in the order of the files.
    """

    window: int
    parts: tuple[int, ...]


class WindowOrder:
    """Passes over files in random order, with samples permuted within windows.

    A pass visits the files one after the other, each from its first sample to its last. This
    sequence is cut into windows of `window` samples, each of which is permuted. A window may span
    the end of a file and the beginning of the next.

    The shuffle buffers of WebDataset and Hugging Face datasets also hold a fixed number of samples,
    but their content depends on all earlier samples: to resume, it must be stored, or the data read
    again. Here each draw is a function of the seed and its number alone, so a run resumes at any
    step, and any number of workers and processes see the same order.

    Args:
        shuffle: window and sizes of the files.
        seed: integers that identify the run, its stage, and the data.
    """

    def __init__(self, shuffle: Shuffle, seed: Sequence[int]):
        self._window = shuffle.window
        self._parts = np.array(shuffle.parts, np.int64)
        self._starts = np.cumsum(self._parts) - self._parts
        self._total = int(self._parts.sum())
        self._seed = list(seed)
        # A step may use two windows, and so two passes; workers are a few steps ahead.
        self._files = lru_cache(maxsize=4)(self._draw_files)
        self._inside = lru_cache(maxsize=4)(self._draw_inside)

    def index(self, draw: int) -> int:
        """Index of the sample of draw `draw`, counted from 0 over all passes."""
        number, at = divmod(draw, self._total)
        window, offset = divmod(at, self._window)
        at = window * self._window + int(self._inside(number, window)[offset])
        order, ends = self._files(number)
        place = bisect_right(ends, at)
        part = order[place]
        return int(self._starts[part]) + at - (ends[place] - int(self._parts[part]))

    def _draw_files(self, number: int) -> tuple[list[int], list[int]]:
        """Files of a pass in order, and the end of each in the pass."""
        order = self._rng(number).permutation(len(self._parts))
        return order.tolist(), np.cumsum(self._parts[order]).tolist()

    def _draw_inside(self, number: int, window: int) -> NDArray[np.int64]:
        size = min(self._window, self._total - window * self._window)
        return self._rng(number, window).permutation(size)

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=key))
