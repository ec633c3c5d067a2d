"""Exact accuracy, and the blind baseline."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from examples.demo.example import Example


def exact_accuracy(folder: Path, examples: Sequence[Example]) -> float:
    """Share of an evaluation's outputs that equal the expected answers exactly.

    Args:
        folder: output folder of `unimoe eval`, with `answers.jsonl`.
        examples: the examples that were asked, in order.

    Raises:
        ValueError: If the numbers of outputs and examples differ.
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

    This is the best accuracy without the input that the task is about. Ties go to the answer that
    comes first alphabetically; a key without training examples gets the overall most frequent one.
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
