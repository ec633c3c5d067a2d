"""Picture tasks: the name of a thing, the kind of thing, and easy-VQA's captions and questions."""

import random
from collections.abc import Iterable, Mapping, Sequence

from examples.demo import easy_vqa
from examples.demo.example import Example
from examples.demo.limits import draw
from examples.smol.catalogue import Catalogue, is_held_out
from examples.smol.item import Item
from examples.smol.media import MediaPlan
from examples.smol.sizes import Sizes
from examples.smol.sources.drawings import HELD_OUT_STYLE

ASK_NAME = ("what is in the picture?", "what does the picture show?", "what is this?")
ASK_KIND = "what kind of thing is in the picture?"
ASK_SHAPE = "which shape is in the picture, and what color is it?"


def training_pictures(
    catalogue: Catalogue, split: Mapping[str, frozenset[str]], plan: MediaPlan, sizes: Sizes
) -> dict[str, list[Example]]:
    """Returns the tasks `picture`, `kind`, `shape` and `image_qa`.

    They exclude drawings of Noto, the stamps held out by the split and easy-VQA's test set.
    """
    drawn = trained_drawings(catalogue, sizes)
    stamps = [item for item in catalogue.stamps if not is_held_out(split, "stamps", item.group)]
    variants = range(sizes.variants)
    return {
        "picture": _named("picture", drawn + stamps, variants, plan),
        "kind": _kinds(stamps, variants, plan),
        "shape": _shapes("train", sizes.asked_pictures),
        "image_qa": _asked("train", sizes.asked_pictures),
    }


def held_out_pictures(
    catalogue: Catalogue, split: Mapping[str, frozenset[str]], plan: MediaPlan, sizes: Sizes
) -> dict[str, list[Example]]:
    """Returns the tasks `drawing`, `stamp`, `kind`, `photograph` and `image_qa`.

    `drawing` holds out a style; `stamp` and `kind` hold out things. The names of `drawing` and
    `stamp` occur in training.
    """
    trained = trained_drawings(catalogue, sizes)
    names = {item.label for item in trained}
    style = [item for item in catalogue.drawings[HELD_OUT_STYLE] if item.label in names]
    stamps = [item for item in catalogue.stamps if is_held_out(split, "stamps", item.group)]
    most = sizes.held_out
    return {
        "drawing": _named("drawing", draw(style, most), range(1), plan),
        "stamp": _named("stamp", [i for i in stamps if i.label in names], range(1), plan),
        "kind": _kinds(draw([i for i in stamps if i.category], most), range(1), plan),
        "photograph": _named("photograph", catalogue.photographs, range(1), plan),
        "image_qa": draw(_asked("test", None), most),
    }


def trained_drawings(catalogue: Catalogue, sizes: Sizes) -> list[Item]:
    """Returns the drawings of the training styles, for up to `sizes.drawings` names."""
    styles = [own for style, own in catalogue.drawings.items() if style != HELD_OUT_STYLE]
    names = sorted({item.label for own in styles for item in own})
    taken = set(draw(names, sizes.drawings))
    return [item for own in styles for item in own if item.label in taken]


def easy_vqa_captions(split: str, most: int | None = None) -> list[tuple[Example, str]]:
    """Returns pictures of easy-VQA, as examples without a question, and their captions."""
    paths = easy_vqa.image_paths(split, most)
    labels = easy_vqa.labels(split)[: len(paths)]
    return [
        (Example("", "", "", (("image", path),)), f"{label['color']} {label['shape']}")
        for path, label in zip(paths, labels, strict=True)
        if {"color", "shape"} <= label.keys()
    ]


def _named(
    task: str, items: Sequence[Item], variants: Iterable[int], plan: MediaPlan
) -> list[Example]:
    rng = random.Random(task)
    examples = []
    for item in items:
        for variant in variants:
            question = rng.choice(ASK_NAME)
            media = (("image", plan.picture(item, variant)),)
            examples.append(Example(task, question, item.label, media, blind_key=ASK_NAME[0]))
    return examples


def _kinds(items: Sequence[Item], variants: Iterable[int], plan: MediaPlan) -> list[Example]:
    return [
        Example("kind", ASK_KIND, item.category, (("image", plan.picture(item, variant)),))
        for item in items
        if item.category
        for variant in variants
    ]


def _shapes(split: str, most: int | None) -> list[Example]:
    return [
        Example("shape", ASK_SHAPE, caption, picture.media)
        for picture, caption in easy_vqa_captions(split, most)
    ]


def _asked(split: str, most: int | None) -> list[Example]:
    paths = easy_vqa.image_paths(split, most)
    return [
        Example(
            "image_qa",
            question.question,
            question.answer,
            (("image", paths[question.image_index]),),
            blind_key=question.question,
        )
        for question in easy_vqa.questions(split)
        if question.image_index < len(paths)
    ]
