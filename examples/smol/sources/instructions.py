"""Short instructions and questions for synthesised speech, each with a single right answer."""

import itertools
from dataclasses import dataclass

from examples.smol.spoken_words import NUMBERS

_MOST_ADDED = 9
_OPPOSITES = (
    "hot cold, big small, up down, left right, day night, open closed, fast slow, old new, "
    "wet dry, light dark, high low, happy sad, good bad, early late, full empty, hard soft, "
    "loud quiet, first last, long short, black white"
)
_COLORS = (
    "grass green, snow white, coal black, blood red, a banana yellow, a tomato red, milk white, "
    "an orange orange, the sky blue, a lemon yellow"
)
_CALLS = "moo cow, meow cat, woof dog, oink pig, neigh horse, baa sheep, quack duck, hoot owl"
_LEGS = "dog four, cat four, spider eight, bird two, person two, ant six, cow four, fish zero"
_YOUNG = "dog puppy, cat kitten, cow calf, sheep lamb, horse foal, hen chick"
_REPEATED = (
    "water music garden window summer winter river mountain paper table bread butter sugar apple "
    "yellow purple silver doctor teacher brother sister morning evening letter number question"
)


@dataclass(frozen=True)
class Instruction:
    """An instruction, its right answer, and the group that is held out together."""

    text: str
    answer: str
    group: str


def instructions() -> list[Instruction]:
    """Returns sums, opposites, colours, animals' calls, legs and young, and words to repeat."""
    found = []
    for first, second in itertools.product(range(1, _MOST_ADDED + 1), repeat=2):
        text = f"what is {NUMBERS[first]} plus {NUMBERS[second]}?"
        group = f"{min(first, second)} plus {max(first, second)}"
        found.append(Instruction(text, NUMBERS[first + second], group))
    for first, second in map(str.split, _OPPOSITES.split(", ")):
        for word, answer in ((first, second), (second, first)):
            text = f"what is the opposite of {word}?"
            found.append(Instruction(text, answer, f"opposite of {first}"))
    for known, template in (
        (_COLORS, "what color is {}?"),
        (_CALLS, "which animal says {}?"),
        (_LEGS, "how many legs does a {} have?"),
        (_YOUNG, "what is a young {} called?"),
    ):
        for pair in known.split(", "):
            thing, answer = pair.rsplit(" ", 1)
            text = template.format(thing)
            found.append(Instruction(text, answer, text))
    for word in _REPEATED.split():
        found.append(Instruction(f"say the word {word}.", word, f"say {word}"))
    return found
