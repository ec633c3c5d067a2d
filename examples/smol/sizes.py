"""The number of items of each set."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """The maximum number of items of each set.

    Attributes:
        drawings: names whose drawings are trained; None for all.
        variants: renderings of each training picture.
        asked_pictures: training pictures of easy-VQA.
        words: spoken words.
        questions: spoken questions about pictures.
        transcripts: spoken questions and instructions to be transcribed.
        phrases: spoken phrases of other words to be transcribed.
        instructions: spoken instructions.
        prompts: prompts that SmolLM2 replies to; None for all.
        writings: texts that SmolLM2 writes.
        spoken_prompts: prompts that are also spoken.
        notes: notes of General MIDI.
        mixed: prompts with a picture, a spoken question and a sound.
        held_out: held-out examples of each task.
    """

    drawings: int | None = None
    variants: int = 3
    asked_pictures: int = 1500
    words: int = 1500
    questions: int = 600
    transcripts: int = 1000
    phrases: int = 4000
    instructions: int = 600
    prompts: int | None = None
    writings: int = 900
    spoken_prompts: int = 250
    notes: int = 640
    mixed: int = 900
    held_out: int = 150


QUICK = Sizes(
    drawings=24,
    variants=1,
    asked_pictures=40,
    words=48,
    questions=24,
    transcripts=24,
    phrases=24,
    instructions=24,
    prompts=40,
    writings=24,
    spoken_prompts=8,
    notes=48,
    mixed=24,
    held_out=12,
)
