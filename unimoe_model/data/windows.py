"""The order of data that are shuffled in windows, so that files are read nearly in sequence."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Shuffle:
    """How data are shuffled.

    Attributes:
        window: samples that are shuffled among each other.
        parts: samples of each file, in the order of the files.
    """

    window: int
    parts: tuple[int, ...]


class WindowOrder:
    """Passes over data: the files in a random order, and samples shuffled within windows.

    A pass goes through the files one behind the other, each from its first sample to its last, and
    what it meets is cut into windows of `window` samples, whose insides are permuted. A window may
    hold the end of a file and the beginning of the next.

    A shuffle buffer, as of WebDataset and Hugging Face datasets, holds as many samples and hands
    out a random one while the next comes in; a sample may so move further than a window. What it
    holds depends on all that came before: to resume, one must store it or read that much again.
    Here each draw is a function of the seed and its number alone, so a run resumes at any step, and
    any number of workers and processes see one order.

    Args:
        shuffle: window and files.
        seed: integers that name the run, its stage, and the data.
    """

    def __init__(self, shuffle: Shuffle, seed: Sequence[int]):
        self._window = shuffle.window
        self._parts = np.array(shuffle.parts, np.int64)
        self._starts = np.cumsum(self._parts) - self._parts
        self._total = int(self._parts.sum())
        self._seed = list(seed)
        # A step may touch two windows, and so two passes; workers are some steps ahead.
        self._files = lru_cache(maxsize=4)(self._draw_files)
        self._inside = lru_cache(maxsize=4)(self._draw_inside)

    def index(self, draw: int) -> int:
        """The sample of a draw, counted from 0 over all passes."""
        number, at = divmod(draw, self._total)
        window, offset = divmod(at, self._window)
        at = window * self._window + int(self._inside(number, window)[offset])
        order, ends = self._files(number)
        place = bisect_right(ends, at)
        part = order[place]
        return int(self._starts[part]) + at - (ends[place] - int(self._parts[part]))

    def _draw_files(self, number: int) -> tuple[list[int], list[int]]:
        """Files of a pass in their order, and where each ends in it."""
        order = self._rng(number).permutation(len(self._parts))
        return order.tolist(), np.cumsum(self._parts[order]).tolist()

    def _draw_inside(self, number: int, window: int) -> NDArray[np.int64]:
        size = min(self._window, self._total - window * self._window)
        return self._rng(number, window).permutation(size)

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=key))
