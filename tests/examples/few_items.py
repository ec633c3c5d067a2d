"""Limits the demo's data to a few items per set, here and in training processes."""

from examples.demo import easy_vqa, general_midi, parts, spoken, sprites, text


def take_few(replace):
    """Limits each set to a few items, by patching the constants that determine their number."""
    splits = {"train": ("train", 0, 12), "validation": ("train", 12, 2), "test": ("test", 0, 6)}
    replace(easy_vqa, "_SPLITS", splits)
    for name in ("WORD_VOICES", "QUESTION_VOICES"):
        replace(spoken, name, {split: own[:1] for split, own in getattr(spoken, name).items()})
    notes = general_midi.PITCHES_AND_VELOCITIES
    few = {split: (pitches[:1], velocities[:1]) for split, (pitches, velocities) in notes.items()}
    replace(general_midi, "PITCHES_AND_VELOCITIES", few)
    replace(sprites, "SPLIT_SIZES", {"train": 8, "validation": 4, "test": 8})
    replace(text, "WIDER_EXAMPLES", 40)
    replace(text, "ASKED_EXAMPLES", 40)
    forget()


def forget():
    """Clears cached questions of other splits."""
    easy_vqa.questions.cache_clear()
    easy_vqa.question_texts.cache_clear()


def train_part(*arguments):
    """Body of a process that trains a part of the demo on the few items."""
    take_few(setattr)
    parts._body(*arguments)
