"""Orders of samples: the batch of each step is a pure function of the seed and the step."""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from unimoe_model.data.windows import Shuffle, WindowOrder

Item = TypeVar("Item")


class Order(ABC, Generic[Item]):
    """The samples of each step.

    A run that resumes from a checkpoint sees the same batches as without the interruption, and
    two models trained with the same seed see the same batches.

    Args:
        tasks: samples by task name.
        names: names of the tasks to use.
        seed: integers that identify the run and its stage.
        shuffles: tasks that are shuffled in windows.

    Attributes:
        total: number of samples of all tasks.
    """

    def __init__(
        self,
        tasks: Mapping[str, Sequence[Item]],
        names: Sequence[str],
        seed: Sequence[int],
        shuffles: Mapping[str, Shuffle] | None = None,
    ):
        self._tasks = {name: tasks[name] for name in names}
        self._names = list(names)
        self._seed = list(seed)
        self._windows = [
            WindowOrder(shuffles[name], [*seed, number]) if name in (shuffles or {}) else None
            for number, name in enumerate(names)
        ]
        self.total = sum(map(len, self._tasks.values()))

    @abstractmethod
    def places(self, step: int, size: int) -> list[tuple[str, int]]:
        """Task name and index of each of the `size` samples of step `step`."""

    def batch(self, step: int, size: int) -> list[Item]:
        """The `size` samples of step `step`."""
        return [self._tasks[name][index] for name, index in self.places(step, size)]


class Mixture(Order[Item]):
    """Draws batches from several tasks by weight, with replacement within each task.

    A task that is shuffled in windows is instead traversed in that order, pass after pass.

    Args:
        tasks: samples by task name.
        weights: share of each task in a batch; need not sum to one.
        seed: integers that identify the run and its stage.
        shuffles: tasks that are shuffled in windows.

    Raises:
        ValueError: If a weighted task is missing or empty, or a weight is not positive.
    """

    def __init__(
        self,
        tasks: Mapping[str, Sequence[Item]],
        weights: Mapping[str, float],
        seed: Sequence[int],
        shuffles: Mapping[str, Shuffle] | None = None,
    ):
        for name, weight in weights.items():
            if not tasks.get(name):
                filled = sorted(n for n, examples in tasks.items() if examples)
                raise ValueError(f"task ({name}) must be one with examples: {filled}")
            if weight <= 0:
                raise ValueError(f"weight of task {name} ({weight}) must be positive")
        super().__init__(tasks, list(weights), seed, shuffles)
        share = np.array(list(weights.values()), dtype=np.float64)
        self._shares = share / share.sum()
        self._totals: dict[int, array] = {}
        self._lock = Lock()

    def places(self, step: int, size: int) -> list[tuple[str, int]]:
        """Task name and index of each of the `size` samples of step `step`."""
        rng, chosen = self._chosen(step, size)
        drawn = self._drawn_before(step, size) if any(self._windows) else []
        found = []
        for task in chosen.tolist():
            name, windows = self._names[task], self._windows[task]
            if windows is None:
                index = int(rng.integers(len(self._tasks[name])))
            else:
                index = windows.index(drawn[task])
                drawn[task] += 1
            found.append((name, index))
        return found

    def _chosen(self, step: int, size: int) -> tuple[np.random.Generator, NDArray[np.int64]]:
        rng = np.random.default_rng([*self._seed, step])
        return rng, rng.choice(len(self._names), size=size, p=self._shares)

    def _drawn_before(self, step: int, size: int) -> list[int]:
        """Number of samples of each task in all earlier steps.

        Counting takes a few seconds per 100,000 steps and is done once.
        """
        tasks = len(self._names)
        with self._lock:
            totals = self._totals.setdefault(size, array("q", [0] * tasks))
            for earlier in range(len(totals) // tasks - 1, step):
                counts = np.bincount(self._chosen(earlier, size)[1], minlength=tasks)
                totals.extend((np.array(totals[-tasks:]) + counts).tolist())
            return totals[step * tasks : (step + 1) * tasks].tolist()


class Turns(Generic[Item]):
    """Mixtures that alternate step by step.

    Args:
        mixtures: mixtures in the order of their turns.

    Attributes:
        total: number of samples of all tasks.
    """

    def __init__(self, mixtures: Sequence[Mixture[Item]]):
        self._mixtures = list(mixtures)
        self.total = sum(mixture.total for mixture in mixtures)

    def places(self, step: int, size: int) -> list[tuple[str, int]]:
        """Task name and index of each of the `size` samples of step `step`."""
        own, number = divmod(step, len(self._mixtures))
        return self._mixtures[number].places(own, size)

    def batch(self, step: int, size: int) -> list[Item]:
        """The `size` samples of step `step`."""
        own, number = divmod(step, len(self._mixtures))
        return self._mixtures[number].batch(own, size)


class Epochs(Order[Item]):
    """Passes over all samples, each a new random permutation.

    For a task that is shuffled in windows, the permutation determines only the positions of its
    samples in the pass; they appear there in the order of the windows.

    Args:
        tasks: samples by task name.
        repeats: how often the samples of each task are seen in a pass.
        seed: integers that identify the run and its stage.
        shuffles: tasks that are shuffled in windows.
    """

    def __init__(
        self,
        tasks: Mapping[str, Sequence[Item]],
        repeats: Mapping[str, int],
        seed: Sequence[int],
        shuffles: Mapping[str, Shuffle] | None = None,
    ):
        super().__init__(tasks, list(repeats), seed, shuffles)
        self._ends = np.cumsum([len(tasks[name]) * times for name, times in repeats.items()])
        # The last batch of a pass may extend into the next pass.
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def places(self, step: int, size: int) -> list[tuple[str, int]]:
        """Task name and index of each of the `size` samples of step `step`."""
        passed, found = int(self._ends[-1]), []
        for at in range(step * size, (step + 1) * size):
            number, place = divmod(at, passed)
            item = int(self._order(number)[place])
            task = int(np.searchsorted(self._ends, item, side="right"))
            start, end = self._bounds(task)
            name, windows = self._names[task], self._windows[task]
            if windows is None:
                index = (item - start) % len(self._tasks[name])
            else:
                index = windows.index(number * (end - start) + item - start)
            found.append((name, index))
        return found

    def _bounds(self, task: int) -> tuple[int, int]:
        return int(self._ends[task - 1]) if task else 0, int(self._ends[task])

    def _draw_order(self, number: int) -> NDArray[np.int64]:
        rng = np.random.default_rng([*self._seed, number])
        order = rng.permutation(int(self._ends[-1]))
        for task, windows in enumerate(self._windows):
            if windows is not None:
                start, end = self._bounds(task)
                order[(order >= start) & (order < end)] = np.arange(start, end)
        return order
