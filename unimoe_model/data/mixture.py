"""Mixtures of tasks whose batches are a pure function of the step."""

from collections.abc import Mapping, Sequence

import numpy as np

from unimoe_model.data.examples import Example


class Mixture:
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
        tasks: Mapping[str, Sequence[Example]],
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

    def batch(self, step: int, size: int) -> list[Example]:
        """The `size` examples of step `step`."""
        rng = np.random.default_rng([*self._seed, step])
        chosen = rng.choice(len(self._tasks), size=size, p=self._shares)
        return [self._tasks[task][rng.integers(len(self._tasks[task]))] for task in chosen.tolist()]
