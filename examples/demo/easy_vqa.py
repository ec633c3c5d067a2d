"""easy-VQA: pictures of coloured shapes with questions, from the package `easy-vqa` (MIT).

The official train and test sets are used. The last 400 training pictures are the validation set
and are not in the training set here.
"""

import json
import re
from functools import cache as memoize
from pathlib import Path
from typing import NamedTuple

from examples.stand_ins.assets import asset_file

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")

# (folder of the package, first picture, number of pictures)
_SPLITS = {
    "train": ("train", 0, 3600),
    "validation": ("train", 3600, 400),
    "test": ("test", 0, 1000),
}
_ATTRIBUTE = re.compile(rf"\b({'|'.join(SHAPES + COLORS)})\b")
_NEGATION = re.compile(r"\b(no|not)\b")


class Question(NamedTuple):
    """A question about a picture of a split.

    Attributes:
        image_index: number of the picture in the split.
        question: as published, e.g. `"what color is the shape?"`.
        answer: one word.
    """

    image_index: int
    question: str
    answer: str


@memoize
def questions(split: str) -> list[Question]:
    """All questions about the pictures of a split, in the published order.

    Args:
        split: `"train"`, `"validation"` or `"test"`.

    Raises:
        ValueError: If the split is unknown.
        MissingAssetError: If the package easy-vqa is not installed.
    """
    folder, first, count = _bounds(split)
    path = asset_file("easy_vqa", "data", folder, "questions.json")
    published = json.loads(path.read_text(encoding="utf-8"))
    return [
        Question(image - first, question, answer)
        for question, answer, image in published
        if first <= image < first + count
    ]


@memoize
def question_texts() -> list[str]:
    """Distinct texts of all questions, sorted."""
    return sorted({q.question for split in ("train", "test") for q in questions(split)})


def image_paths(split: str, most: int | None = None) -> list[Path]:
    """Picture files of a split, in order.

    Args:
        split: `"train"`, `"validation"` or `"test"`.
        most: maximum number of pictures; None for all.

    Raises:
        ValueError: If the split is unknown.
        MissingAssetError: If the package easy-vqa is not installed.
    """
    folder, first, count = _bounds(split)
    images = asset_file("easy_vqa", "data", folder, "questions.json").with_name("images")
    return [
        images / f"{first + index}.png"
        for index in range(count if most is None else min(count, most))
    ]


def labels(split: str) -> list[dict[str, str]]:
    """`color` and `shape` of each picture, as far as its questions determine them.

    Args:
        split: `"train"`, `"validation"` or `"test"`.

    Raises:
        ValueError: If the split is unknown.
        MissingAssetError: If the package easy-vqa is not installed.
    """
    known: list[dict[str, str]] = [{} for _ in range(_bounds(split)[2])]
    for index, question, answer in questions(split):
        known[index].update(stated_attributes(question, answer))
    return known


def stated_attributes(question: str, answer: str) -> dict[str, str]:
    """The attributes of a picture that one answered question determines.

    `"what color is the circle?", "red"` states both the shape and the color; `"is there not a red
    shape?", "no"` states the color; `"is a red shape present?", "no"` states neither.
    """
    is_yes_no = answer in ("yes", "no")
    if is_yes_no and (answer == "yes") == bool(_NEGATION.search(question)):
        return {}
    words = _ATTRIBUTE.findall(question) + ([] if is_yes_no else [answer])
    return {"shape" if word in SHAPES else "color": word for word in words}


def _bounds(split: str) -> tuple[str, int, int]:
    if split not in _SPLITS:
        raise ValueError(f"split ({split!r}) must be one of {sorted(_SPLITS)}")
    return _SPLITS[split]
