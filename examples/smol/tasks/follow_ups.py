"""Conversations about one picture: two or three questions, typed or spoken."""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from examples.demo.example import Example
from unimoe_model.prompt import user_turn

MOST_TURNS = 3
_OF_IT = {
    "color": "what color is it?",
    "shape": "what shape is it?",
    "kind": "what kind of thing is it?",
}


def follow_ups(examples: Iterable[Example]) -> list[Example]:
    """Returns a conversation for each picture that has several questions.

    Later questions may call the thing that is shown "it". Its color and shape are known of pictures
    of the task `shape`, and its kind of those of `kind`.

    Args:
        examples: questions, each about one picture, which is the first of its media.
    """
    rng = random.Random("follow-ups")
    pictures: dict[Path, list[Example]] = {}
    for example in examples:
        pictures.setdefault(example.media[0][1], []).append(example)
    return [_conversation(own, rng) for own in pictures.values() if len(own) > 1]


def _conversation(about: Sequence[Example], rng: random.Random) -> Example:
    count = rng.randint(2, min(MOST_TURNS, len(about)))
    first, *others = rng.sample(about, count)
    of_it = [turn for example in about for turn in _about_it(example)]
    turns, media = [], list(first.media)
    for example in others:
        if of_it and rng.random() < 0.5:
            turns.append(of_it.pop(rng.randrange(len(of_it))))
        else:
            spoken = example.media[1:]
            turns.append((_turn(example.question, spoken), example.answer))
            media += spoken
    question = _turn(first.question, first.media)
    return Example("follow_up", question, first.answer, tuple(media), later=tuple(turns))


def _turn(question: str, media: Iterable[tuple[str, Path]]) -> str:
    return user_turn(question, [kind for kind, _ in media])


def _about_it(example: Example) -> list[tuple[str, str]]:
    if example.task == "shape":
        color, shape = example.answer.split()
        return [(_OF_IT["color"], color), (_OF_IT["shape"], shape)]
    return [(_OF_IT["kind"], example.answer)] if example.task == "kind" else []
