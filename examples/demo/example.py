"""An example: a question, its media files, and its answer."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Example:
    """One question with its answer.

    Attributes:
        task: name of the task it belongs to.
        question: text of the question; empty if it is spoken.
        answer: expected answer.
        media: kind and file of each media item, in prompt order.
        blind_key: everything that is known without the input that is asked about; the blind
            baseline outputs the most frequent training answer of this key.
        later: further questions of a conversation and their answers, in training data only. The
            media belong to the placeholders of all questions, in order.
    """

    task: str
    question: str
    answer: str
    media: tuple[tuple[str, Path], ...] = ()
    blind_key: str = ""
    later: tuple[tuple[str, str], ...] = ()
