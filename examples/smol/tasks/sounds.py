"""Sound tasks: General MIDI families, instruments, and sources of recorded sounds."""

from collections.abc import Mapping

from examples.demo import general_midi
from examples.demo.example import Example
from examples.demo.limits import draw
from examples.demo.text import ASK_FAMILY, ASK_INSTRUMENT
from examples.smol.catalogue import Catalogue, is_held_out
from examples.smol.media import MediaPlan
from examples.smol.sizes import Sizes

ASK_SOUND = "what kind of sound is this?"


def training_sounds(
    catalogue: Catalogue, split: Mapping[str, frozenset[str]], plan: MediaPlan, sizes: Sizes
) -> dict[str, list[Example]]:
    """Returns the tasks `family`, `instrument` and `sound`."""
    notes = draw(general_midi.notes_of("train"), sizes.notes)
    return {
        "family": _families(notes, plan),
        "instrument": [
            Example(
                "instrument",
                ASK_INSTRUMENT,
                general_midi.INSTRUMENTS[note[0]],
                (("audio", plan.note(*note)),),
            )
            for note in notes
        ],
        "sound": _recorded(catalogue, split, plan, held_out=False),
    }


def held_out_sounds(
    catalogue: Catalogue, split: Mapping[str, frozenset[str]], plan: MediaPlan, sizes: Sizes
) -> dict[str, list[Example]]:
    """Returns `family`, at keys without training notes, and `sound`, of held-out recordings."""
    notes = draw(general_midi.notes_of("test"), sizes.held_out)
    return {
        "family": _families(notes, plan),
        "sound": draw(_recorded(catalogue, split, plan, held_out=True), sizes.held_out),
    }


def _families(notes: list[tuple[int, int, int]], plan: MediaPlan) -> list[Example]:
    return [
        Example(
            "family",
            ASK_FAMILY,
            general_midi.family_of(note[0]),
            (("audio", plan.note(*note)),),
            blind_key=ASK_FAMILY,
        )
        for note in notes
    ]


def _recorded(
    catalogue: Catalogue, split: Mapping[str, frozenset[str]], plan: MediaPlan, held_out: bool
) -> list[Example]:
    return [
        Example(
            "sound",
            ASK_SOUND,
            item.label,
            (("audio", plan.recording(item)),),
            blind_key=ASK_SOUND,
        )
        for item in catalogue.sounds
        if is_held_out(split, "sounds", f"{item.source} {item.group}") == held_out
    ]
