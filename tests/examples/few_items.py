"""A few items of each set of the demo's data, in this process and in those that train."""

from examples.demo import easy_vqa, general_midi, parts, spoken, sprites, text


def take_few(replace):
    """Leaves a few items of each set; all that decides their number is a constant."""
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
    """Forgets the questions that were read for other splits."""
    easy_vqa.questions.cache_clear()
    easy_vqa.question_texts.cache_clear()


def train_part(*arguments):
    """Body of a process that trains a part of the demo on the few items."""
    take_few(setattr)
    parts._body(*arguments)
