"""easy-VQA: pictures of coloured shapes with questions, from the package `easy-vqa` (MIT).

The official train and test sets are kept. The last 400 training pictures are the validation set
and are no part of the training set here.
"""

import json
import re
import sys
from collections.abc import Iterator
from functools import cache as memoize
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from unimoe_model.assets import asset_file
from unimoe_model.data.feature_cache import FeatureCache
from unimoe_model.data.media_io import load_image, resize_square
from unimoe_model.data.media_set import MediaSet
from unimoe_model.encoders.efficientnet_lite import EfficientNetLite0

IMAGE_SIZE = 96
SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")

# (folder of the package, first picture, number of pictures)
_SPLITS = {
    "train": ("train", 0, 3600),
    "validation": ("train", 3600, 400),
    "test": ("test", 0, 1000),
}
_BATCH_SIZE = 64
_ATTRIBUTE = re.compile(rf"\b({'|'.join(SHAPES + COLORS)})\b")
_NEGATION = re.compile(r"\b(no|not)\b")


class Question(NamedTuple):
    """A question about a picture of a split.

    Attributes:
        image_index: row of the picture in the split's :class:`MediaSet`.
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
    """The different texts of all questions, sorted."""
    return sorted({q.question for split in ("train", "test") for q in questions(split)})


def image_path(split: str, index: int) -> Path:
    """File of a picture.

    Args:
        split: `"train"`, `"validation"` or `"test"`.
        index: row of the picture in the split's :class:`MediaSet`.

    Raises:
        ValueError: If the split is unknown, or there is no such row.
        MissingAssetError: If the package easy-vqa is not installed.
    """
    folder, first, count = _bounds(split)
    if not 0 <= index < count:
        raise ValueError(f"index ({index}) must be between 0 and {count - 1} in split {split!r}")
    return asset_file("easy_vqa", "data", folder, "images", f"{first + index}.png")


def num_pictures(split: str) -> int:
    """Pictures of a split.

    Raises:
        ValueError: If the split is unknown.
    """
    return _bounds(split)[2]


def labels(split: str) -> list[dict[str, str]]:
    """What is known of each picture: `color` and `shape`, where its questions tell.

    Args:
        split: `"train"`, `"validation"` or `"test"`.

    Raises:
        ValueError: If the split is unknown.
        MissingAssetError: If the package easy-vqa is not installed.
    """
    known: list[dict[str, str]] = [{} for _ in range(num_pictures(split))]
    for index, question, answer in questions(split):
        known[index].update(stated_attributes(question, answer))
    return known


def stated_attributes(question: str, answer: str) -> dict[str, str]:
    """What one answered question says about its picture.

    `"what color is the circle?", "red"` states both the shape and the color; `"is there not a red
    shape?", "no"` states the color; `"is a red shape present?", "no"` states neither.
    """
    is_yes_no = answer in ("yes", "no")
    if is_yes_no and (answer == "yes") == bool(_NEGATION.search(question)):
        return {}
    words = _ATTRIBUTE.findall(question) + ([] if is_yes_no else [answer])
    return {"shape" if word in SHAPES else "color": word for word in words}


def load(
    cache: FeatureCache, encoder: EfficientNetLite0, split: str, most: int | None = None
) -> MediaSet:
    """Features of the pictures of a split, at 96 x 96 pixels: 9 tokens each.

    Args:
        cache: where features are kept.
        encoder: the picture encoder.
        split: `"train"`, `"validation"` or `"test"`.
        most: only the first so many pictures; None for all.

    Returns:
        Features `[M, 9, 1280]` with the labels `color` and `shape`.

    Raises:
        ValueError: If the split is unknown.
        MissingAssetError: If the package easy-vqa is not installed.
    """
    count = min(num_pictures(split), most or sys.maxsize)
    known = labels(split)[:count]
    title = f"easy-vqa {split}"

    def build() -> dict[str, Tensor]:
        return {"features": encoder.encode(_images(split, count), count, title)}

    folder, first, _ = _bounds(split)
    fingerprint = f"easy-vqa 1.0 {(folder, first, count)} {IMAGE_SIZE} px, {encoder.fingerprint()}"
    features = cache.load_or_build(f"easy_vqa-{split}", fingerprint, build)["features"]
    return MediaSet(features, torch.full((count,), features.shape[1]), known)


def _images(split: str, count: int) -> Iterator[Tensor]:
    for first in range(0, count, _BATCH_SIZE):
        indices = range(first, min(first + _BATCH_SIZE, count))
        yield torch.stack(
            [resize_square(load_image(image_path(split, i)), IMAGE_SIZE) for i in indices]
        )


def _bounds(split: str) -> tuple[str, int, int]:
    if split not in _SPLITS:
        raise ValueError(f"split ({split!r}) must be one of {sorted(_SPLITS)}")
    return _SPLITS[split]
