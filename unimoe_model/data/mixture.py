"""Mixtures of tasks whose batches are a pure function of the step."""

from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np

Item = TypeVar("Item")


class Mixture(Generic[Item]):
    """Draws batches from several tasks by weight.

    Batch `step` depends on the seed and the step alone, so a run that continues from a checkpoint
    sees the batches it would have seen, and two models trained with one seed see the same ones.

    Args:
        tasks: examples by task name.
        weights: share of each task in a batch; need not sum to one.
        seed: any integers that name the run and its stage.

    Raises:
        ValueError: If a weighted task is missing or empty, or a weight is not positive.
    """

    def __init__(
        self,
        tasks: Mapping[str, Sequence[Item]],
        weights: Mapping[str, float],
        seed: Sequence[int],
    ):
        for name, weight in weights.items():
            if not tasks.get(name):
                filled = sorted(n for n, examples in tasks.items() if examples)
                raise ValueError(f"task ({name}) must be one with examples: {filled}")
            if weight <= 0:
                raise ValueError(f"weight of task {name} ({weight}) must be positive")
        self._tasks = [tasks[name] for name in weights]
        share = np.array(list(weights.values()), dtype=np.float64)
        self._shares = share / share.sum()
        self._seed = list(seed)

    def batch(self, step: int, size: int) -> list[Item]:
        """The `size` examples of step `step`."""
        rng = np.random.default_rng([*self._seed, step])
        chosen = rng.choice(len(self._tasks), size=size, p=self._shares)
        return [self._tasks[task][rng.integers(len(self._tasks[task]))] for task in chosen.tolist()]


class Turns(Generic[Item]):
    """Mixtures that take turns, a step each.

    Args:
        mixtures: in their order.
    """

    def __init__(self, mixtures: Sequence[Mixture[Item]]):
        self._mixtures = list(mixtures)

    def batch(self, step: int, size: int) -> list[Item]:
        """The `size` examples of step `step`."""
        own, number = divmod(step, len(self._mixtures))
        return self._mixtures[number].batch(own, size)


class Epochs(Generic[Item]):
    """Passes over all samples, each in an order of its own.

    Args:
        tasks: examples by task name.
        repeats: how often each task's examples are seen in a pass.
        seed: any integers that name the run and its stage.
    """

    def __init__(
        self,
        tasks: Mapping[str, Sequence[Item]],
        repeats: Mapping[str, int],
        seed: Sequence[int],
    ):
        self._items = [item for name, times in repeats.items() for item in [*tasks[name]] * times]
        self._seed = list(seed)
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, step: int, size: int) -> list[Item]:
        """The `size` examples of step `step`; the last batch of a pass ends in the next one."""
        places = range(step * size, (step + 1) * size)
        return [
            self._items[self._order(at // len(self._items))[at % len(self._items)]] for at in places
        ]

    def _order(self, number: int) -> np.ndarray:
        if number not in self._orders:
            self._orders = {n: o for n, o in self._orders.items() if abs(n - number) < 2}
            rng = np.random.default_rng([*self._seed, number])
            self._orders[number] = rng.permutation(len(self._items))
        return self._orders[number]
