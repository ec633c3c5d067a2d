"""How many items of each set are taken."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Most items of each set.

    Attributes:
        drawings: names whose drawings are learned; None is all.
        variants: renderings of each picture that is learned.
        asked_pictures: training pictures of easy-VQA.
        words: spoken words.
        questions: spoken questions about pictures.
        transcripts: phrases to be written down.
        instructions: spoken instructions.
        prompts: prompts that SmolLM2 answers; None is all.
        spoken_prompts: of these, spoken too.
        notes: of General MIDI.
        mixed: prompts of a picture, a spoken question and a sound.
        held_out: held-out examples of each task.
    """

    drawings: int | None = None
    variants: int = 3
    asked_pictures: int = 1500
    words: int = 900
    questions: int = 600
    transcripts: int = 500
    instructions: int = 600
    prompts: int | None = None
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
    instructions=24,
    prompts=40,
    spoken_prompts=8,
    notes=48,
    mixed=24,
    held_out=12,
)
