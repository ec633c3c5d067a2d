"""Limits on the data of a run."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class DataLimits:
    """Maximum number of training items of each media set; None for all.

    Attributes:
        pictures: of 3600.
        words: spoken words, of 1200.
        questions: spoken questions, of 1498.
        sounds: notes, of 2560.
        videos: clips, of 4000.
    """

    pictures: int | None = None
    words: int | None = None
    questions: int | None = None
    sounds: int | None = None
    videos: int | None = None

    def __post_init__(self):
        for name, most in asdict(self).items():
            if most is not None and most < 1:
                raise ValueError(f"{name} ({most}) must be at least 1")


def draw(items: Sequence[Item], most: int | None, seed: int = 0) -> list[Item]:
    """All items, or a seeded sample of `most` of them, in their order."""
    if most is None or most >= len(items):
        return list(items)
    chosen = sorted(random.Random(seed).sample(range(len(items)), most))
    return [items[index] for index in chosen]
