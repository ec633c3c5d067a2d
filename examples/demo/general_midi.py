"""Notes of the 128 General MIDI instruments, with pitches and velocities disjoint by split."""

import itertools

import numpy as np
from numpy.typing import NDArray

from examples.stand_ins.assets import asset_file, asset_folder

FAMILIES = {
    "piano": (
        "acoustic grand piano, bright acoustic piano, electric grand piano, honky-tonk piano, "
        "electric piano 1, electric piano 2, harpsichord, clavinet"
    ),
    "chromatic percussion": (
        "celesta, glockenspiel, music box, vibraphone, marimba, xylophone, tubular bells, dulcimer"
    ),
    "organ": (
        "drawbar organ, percussive organ, rock organ, church organ, reed organ, accordion, "
        "harmonica, tango accordion"
    ),
    "guitar": (
        "nylon guitar, steel guitar, jazz guitar, clean guitar, muted guitar, overdriven guitar, "
        "distortion guitar, guitar harmonics"
    ),
    "bass": (
        "acoustic bass, fingered bass, picked bass, fretless bass, slap bass 1, slap bass 2, "
        "synth bass 1, synth bass 2"
    ),
    "strings": (
        "violin, viola, cello, contrabass, tremolo strings, pizzicato strings, orchestral harp, "
        "timpani"
    ),
    "ensemble": (
        "string ensemble 1, string ensemble 2, synth strings 1, synth strings 2, choir aahs, "
        "voice oohs, synth voice, orchestra hit"
    ),
    "brass": (
        "trumpet, trombone, tuba, muted trumpet, french horn, brass section, synth brass 1, "
        "synth brass 2"
    ),
    "reed": (
        "soprano sax, alto sax, tenor sax, baritone sax, oboe, english horn, bassoon, clarinet"
    ),
    "pipe": ("piccolo, flute, recorder, pan flute, blown bottle, shakuhachi, whistle, ocarina"),
    "synth lead": (
        "square lead, sawtooth lead, calliope lead, chiff lead, charang lead, voice lead, "
        "fifths lead, bass and lead"
    ),
    "synth pad": (
        "new age pad, warm pad, polysynth pad, choir pad, bowed pad, metallic pad, halo pad, "
        "sweep pad"
    ),
    "synth effects": ("rain, soundtrack, crystal, atmosphere, brightness, goblins, echoes, sci-fi"),
    "ethnic": "sitar, banjo, shamisen, koto, kalimba, bagpipe, fiddle, shanai",
    "percussive": (
        "tinkle bell, agogo, steel drums, woodblock, taiko drum, melodic tom, synth drum, "
        "reverse cymbal"
    ),
    "sound effects": (
        "guitar fret noise, breath noise, seashore, bird tweet, telephone ring, helicopter, "
        "applause, gunshot"
    ),
}
"""Families of General MIDI level 1: eight instruments each, in the order of their programs."""

INSTRUMENTS = tuple(name for names in FAMILIES.values() for name in names.split(", "))
"""Name of every program, 0 to 127."""

PITCHES_AND_VELOCITIES = {
    "train": ((40, 44, 48, 52, 56, 60, 63, 68, 72, 76), (100, 60)),
    "validation": ((50, 66), (90,)),
    "test": ((42, 46, 54, 58, 62, 70), (80,)),
}
"""MIDI keys and velocities by split; no key and no velocity is in two splits.

Every instrument sounds at all of these keys; the sound font has gaps at others (alto sax at 64).
"""

SAMPLE_RATE = 44_100
CLIP_SAMPLES = 79 * 1024  # 1.83 s: 80 mel frames of aiSFX, which makes 10 rows of them
_HELD_SAMPLES = 52_920  # the key is released after 1.2 s
_DRAIN_SAMPLES = 4_410  # a voice cut off takes a few ms to fall silent


def family_of(program: int) -> str:
    """Family of a General MIDI program.

    Args:
        program: 0 to 127.
    """
    return tuple(FAMILIES)[program // 8]


class Sampler:
    """Plays single notes of the TimGM6mb sound font.

    Raises:
        MissingAssetError: If the package `pretty_midi` or `tinysoundfont` is not installed.
    """

    def __init__(self) -> None:
        sound_font = asset_file("pretty_midi", "TimGM6mb.sf2")
        asset_folder("tinysoundfont")
        import tinysoundfont

        self.synth = tinysoundfont.Synth(samplerate=SAMPLE_RATE)
        self.sound_font = self.synth.sfload(str(sound_font))

    def render(self, program: int, pitch: int, velocity: int) -> NDArray[np.float32]:
        """Plays one note; the same arguments always give the same samples.

        Args:
            program: General MIDI program, 0 to 127.
            pitch: MIDI key, 0 to 127 (60 is middle C).
            velocity: how hard the key is struck, 1 to 127.

        Returns:
            `[80896]` at 44.1 kHz, both channels averaged.

        Raises:
            ValueError: If an argument is out of range.
        """
        for name, value, low in (
            ("program", program, 0),
            ("pitch", pitch, 0),
            ("velocity", velocity, 1),
        ):
            if not low <= value <= 127:
                raise ValueError(f"{name} ({value}) must be between {low} and 127")
        self.synth.program_select(0, self.sound_font, 0, program)
        self.synth.noteon(0, pitch, velocity)
        held = self._generate(_HELD_SAMPLES)
        self.synth.noteoff(0, pitch)
        released = self._generate(CLIP_SAMPLES - _HELD_SAMPLES)
        self.synth.sounds_off(0)
        self._generate(_DRAIN_SAMPLES)
        return np.concatenate([held, released])

    def _generate(self, samples: int) -> NDArray[np.float32]:
        left, right = np.frombuffer(self.synth.generate(samples), np.float32).reshape(-1, 2).T
        return (left + right) / 2


def render(program: int, pitch: int, velocity: int) -> NDArray[np.float32]:
    """Plays one note on a new sampler; see `Sampler.render`."""
    return Sampler().render(program, pitch, velocity)


def notes_of(split: str) -> list[tuple[int, int, int]]:
    """Program, MIDI key and velocity of every clip of a split.

    Args:
        split: `"train"`, `"validation"` or `"test"`.

    Raises:
        ValueError: If there is no such split.
    """
    if split not in PITCHES_AND_VELOCITIES:
        raise ValueError(f"split ({split!r}) must be one of {', '.join(PITCHES_AND_VELOCITIES)}")
    pitches, velocities = PITCHES_AND_VELOCITIES[split]
    return list(itertools.product(range(len(INSTRUMENTS)), pitches, velocities))
