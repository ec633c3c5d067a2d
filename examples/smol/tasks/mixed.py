"""Prompts with a picture, a sound and a spoken question about one of them or both."""

import random

from examples.demo import general_midi
from examples.demo.example import Example
from examples.demo.spoken import QUESTION_VOICES
from examples.smol.media import MediaPlan
from examples.smol.tasks.pictures import easy_vqa_captions

ABOUT_PICTURE = ("what is in the picture?", "what can you see?")
ABOUT_SOUND = ("which instruments are heard?", "what can you hear?")
ABOUT_BOTH = ("what is seen and heard?", "what can you see and hear?")


def mixed(split: str, most: int, plan: MediaPlan) -> list[Example]:
    """Returns prompts about pictures of easy-VQA and notes of General MIDI.

    Args:
        split: `"train"` or `"test"`; applies to pictures, voices and notes.
        most: number of prompts.
        plan: plan to which the phrases and notes are added.
    """
    rng = random.Random(f"mixed/{split}")
    pictures = easy_vqa_captions(split)
    notes = general_midi.notes_of(split)
    examples = []
    for number in range(most):
        picture, shown = rng.choice(pictures)
        note = rng.choice(notes)
        family = general_midi.family_of(note[0])
        texts, answer = (
            (ABOUT_PICTURE, shown),
            (ABOUT_SOUND, family),
            (ABOUT_BOTH, f"{shown}, {family}"),
        )[number % 3]
        text = rng.choice(texts)
        media = (
            *picture.media,
            ("speech", plan.phrase(text, rng.choice(QUESTION_VOICES[split]))),
            ("audio", plan.note(*note)),
        )
        examples.append(Example("mixed", "", answer, media, blind_key=text))
    return examples
