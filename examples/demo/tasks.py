"""The demo's tasks: the examples of each split, in order."""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.demo import easy_vqa, general_midi, spoken, sprites
from examples.demo.example import Example
from examples.demo.limits import DataLimits, draw
from examples.demo.media import MediaFiles, clip_labels, media_files
from examples.demo.settings import TASKS
from examples.demo.text import (
    ASK_FAMILY,
    ASK_INSTRUMENT,
    ASK_MOTION,
    ASK_PICTURE,
    ASK_TRANSCRIPT,
    ASK_WORD,
    HELD_OUT_PAIRS,
    pretraining_tasks,
    reading_examples,
    trained_pairs,
)


def build_examples(
    split: str, media: Path, seed: int, limits: DataLimits, for_pretraining: bool = True
) -> dict[str, list[Example]]:
    """Builds all examples of a split, by task, without reading or writing media.

    Args:
        split: `"train"`, `"validation"` or `"test"`.
        media: folder of all media files other than pictures, which need not exist yet.
        seed: determines which pictures spoken questions are about, and which items are drawn.
        limits: maximum number of items of each media set of the split `"train"`.
        for_pretraining: whether to include the text tasks for pretraining in `"train"`.

    Returns:
        Tasks `image_qa`, `spoken_word`, `spoken_question`, `sound`, `video` and `text` (the
        evaluated ones) and `picture`, `transcript`, `instrument` (for the alignment of stage 1). In
        `"train"` also the text tasks for pretraining a language model; in other splits, `text` has
        sentences with pairs of colour and shape that no training text has.

    Raises:
        ValueError: If the split is unknown.
        MissingAssetError: If a package of the demo's data is not installed.
    """
    files = media_files(split, media, seed, limits)
    asked = _asked(split, files)
    examples = {
        "image_qa": asked,
        "picture": _captions(split, files),
        **_speech(split, files, asked, seed),
        **_sounds(files),
        "video": _videos(split, files),
    }
    if split == "train":
        return examples | text_examples(seed, for_pretraining)
    return examples | {"text": held_out_text(split)}


def held_out_examples(
    split: str, media: Path, seed: int, held_out: Mapping[str, int]
) -> dict[str, list[Example]]:
    """Selects the examples of the six evaluated tasks to ask.

    Args:
        split: name of the split.
        media: folder of all media files other than pictures.
        seed: seed of the examples, and of their selection.
        held_out: maximum number of examples by task; all for tasks that are not named.
    """
    examples = build_examples(split, media, seed, DataLimits())
    return {task: draw(examples[task], held_out.get(task), seed) for task in TASKS}


def held_out_text(split: str) -> list[Example]:
    """Questions about sentences with pairs of colour and shape that no training text has."""
    return reading_examples(easy_vqa.question_texts(), HELD_OUT_PAIRS[split])


def text_examples(seed: int, for_pretraining: bool = True) -> dict[str, list[Example]]:
    """The text tasks of pretraining; `text` is also used by stage 3 and evaluated."""
    labels = {(label.get("color"), label.get("shape")) for label in easy_vqa.labels("train")}
    pairs = sorted(pair for pair in labels if None not in pair)
    if not for_pretraining:
        return {"text": reading_examples(easy_vqa.question_texts(), trained_pairs(pairs))}
    return pretraining_tasks(
        questions=easy_vqa.question_texts(),
        pairs=pairs,
        families={
            name: general_midi.family_of(program)
            for program, name in enumerate(general_midi.INSTRUMENTS)
        },
        motions=sprites.MOTIONS,
        things=[sprites.sprite_name(c) for c in sprites.concepts("train")][:200],
        words=spoken.WORDS,
        seed=seed,
    )


def _asked(split: str, files: MediaFiles) -> list[Example]:
    return [
        Example(
            "image_qa",
            question.question,
            question.answer,
            (("image", files.pictures[question.image_index]),),
            blind_key=question.question,
        )
        for question in easy_vqa.questions(split)
        if question.image_index < len(files.pictures)
    ]


def _captions(split: str, files: MediaFiles) -> list[Example]:
    labels = easy_vqa.labels(split)[: len(files.pictures)]
    return [
        Example("picture", ASK_PICTURE, f"a {label['color']} {label['shape']}", (("image", path),))
        for path, label in zip(files.pictures, labels, strict=True)
        if {"color", "shape"} <= label.keys()
    ]


def _speech(
    split: str, files: MediaFiles, asked: Sequence[Example], seed: int
) -> dict[str, list[Example]]:
    return {
        "spoken_word": [
            Example("spoken_word", ASK_WORD, word, (("speech", path),), blind_key=ASK_WORD)
            for path, (word, _) in files.words.items()
        ],
        "transcript": [
            Example("transcript", ASK_TRANSCRIPT, text, (("speech", path),))
            for path, (text, _) in files.questions.items()
        ],
        "spoken_question": _spoken_questions(split, files, asked, seed),
    }


def _spoken_questions(
    split: str, files: MediaFiles, asked: Sequence[Example], seed: int
) -> list[Example]:
    by_text = defaultdict(list)
    for example in asked:
        by_text[example.question].append(example)
    rng = random.Random(f"{seed}/{split}")
    pictures_each = 20 if split == "train" else 1
    examples = []
    for path, (text, _) in files.questions.items():
        candidates = by_text[text]
        for about in rng.sample(candidates, min(pictures_each, len(candidates))):
            media = (*about.media, ("speech", path))
            examples.append(Example("spoken_question", "", about.answer, media, blind_key=text))
    return examples


def _sounds(files: MediaFiles) -> dict[str, list[Example]]:
    programs = [(path, program) for path, (program, _, _) in files.sounds.items()]
    return {
        "sound": [
            Example(
                "sound",
                ASK_FAMILY,
                general_midi.family_of(program),
                (("audio", path),),
                blind_key=ASK_FAMILY,
            )
            for path, program in programs
        ],
        "instrument": [
            Example(
                "instrument", ASK_INSTRUMENT, general_midi.INSTRUMENTS[program], (("audio", path),)
            )
            for path, program in programs
        ],
    }


def _videos(split: str, files: MediaFiles) -> list[Example]:
    return [
        Example(
            "video",
            ASK_MOTION,
            clip_labels(split, index)[1],
            (("video", path),),
            blind_key=ASK_MOTION,
        )
        for path, index in files.videos.items()
    ]
