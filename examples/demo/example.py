"""An example: a question, the files that it is about, and its answer."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Example:
    """One question with its answer.

    Attributes:
        task: name of the task it belongs to.
        question: text of the question; empty where it is spoken.
        answer: expected answer.
        media: kind and file of each item it is about, in prompt order.
        blind_key: what a reader sees who is given everything but the input asked about; the
            blind baseline answers with the most frequent training answer of this key.
    """

    task: str
    question: str
    answer: str
    media: tuple[tuple[str, Path], ...] = ()
    blind_key: str = ""
