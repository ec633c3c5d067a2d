"""Accuracy letter for letter, and the blind baseline."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from examples.demo.example import Example


def exact_accuracy(folder: Path, examples: Sequence[Example]) -> float:
    """Share of the answers of an evaluation that are the expected ones, letter for letter.

    Args:
        folder: where `unimoe eval` left `answers.jsonl`.
        examples: what was asked, in its order.

    Raises:
        ValueError: If there are not as many answers as examples.
    """
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    if not examples or len(answers) != len(examples):
        raise ValueError(
            f"answers in {folder} ({len(answers)}) must be as many as examples ({len(examples)})"
        )
    pairs = zip(answers, examples, strict=True)
    return sum(answer == example.answer for answer, example in pairs) / len(examples)


def blind_accuracy(train: Sequence[Example], examples: Sequence[Example]) -> float:
    """Accuracy of the most frequent training answer of each example's `blind_key`.

    This is the best that can be done without the input the task is about. Ties go to the answer
    that comes first in the alphabet; a key without training examples gets the overall answer.
    """
    by_key: dict[str, Counter] = defaultdict(Counter)
    overall: Counter = Counter()
    for example in train:
        by_key[example.blind_key][example.answer] += 1
        overall[example.answer] += 1
    answers = [_most_frequent(by_key.get(e.blind_key) or overall) for e in examples]
    return sum(a == e.answer for a, e in zip(answers, examples, strict=True)) / len(examples)


def _most_frequent(counts: Counter) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))
