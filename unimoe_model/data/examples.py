"""Examples (a question, its media, its answer), and the bank that holds the media's features."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from unimoe_model.configuration import MEDIA_KINDS

EVALUATED_TASKS = ("image_qa", "spoken_word", "spoken_question", "sound", "video", "text")
"""The six tasks of the table, in its order."""

ALIGNING_TASKS = ("picture", "transcript", "instrument")
TEXT_TASKS = ("asked", "wider", "describe", "repeat", "sounds", "moving", "talk")
TASKS = (*EVALUATED_TASKS, *ALIGNING_TASKS, *TEXT_TASKS)
"""All that `TaskBuilder` has training examples of."""


@dataclass(frozen=True)
class MediaRef:
    """Item `index` of the set `source` in a `MediaBank`; `kind` says how the model reads it."""

    kind: str
    source: str
    index: int


@dataclass(frozen=True)
class Example:
    """One question with its answer.

    Attributes:
        task: name of the task it belongs to.
        question: text of the question; empty where it is spoken.
        answer: expected answer.
        media: the media it is about, in prompt order.
        blind_key: what a reader sees who is given everything but the input asked about; the
            blind baseline answers with the most frequent training answer of this key.
    """

    task: str
    question: str
    answer: str
    media: tuple[MediaRef, ...] = ()
    blind_key: str = ""


@dataclass
class MediaBank:
    """Features of media sets by source name, each already in the shape the model takes."""

    sets: dict[str, torch.Tensor] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    def add(self, source: str, kind: str, features: torch.Tensor) -> None:
        """Adds (or replaces) a set.

        Args:
            source: name that `MediaRef.source` refers to.
            kind: kind of media its items are.
            features: `[items, ...]`, any floating dtype.
        """
        self.sets[source] = features
        self.kinds[source] = kind

    def gather(self, refs: Sequence[MediaRef]) -> dict[str, torch.Tensor]:
        """Stacks the items of each kind, in the order given, as float32.

        Raises:
            ValueError: If a source is unknown or sets of one kind differ in shape.
        """
        gathered = {}
        for kind in MEDIA_KINDS:
            wanted = [ref for ref in refs if ref.kind == kind]
            if not wanted:
                continue
            unknown = {ref.source for ref in wanted} - self.sets.keys()
            if unknown:
                raise ValueError(f"source ({sorted(unknown)}) must be among {sorted(self.sets)}")
            shapes = {self.sets[ref.source].shape[1:] for ref in wanted}
            if len(shapes) > 1:
                raise ValueError(f"{kind} sets of one batch must share a shape, got {shapes}")
            rows = [self.sets[ref.source][ref.index] for ref in wanted]
            gathered[kind] = torch.stack(rows).float()
        return gathered
