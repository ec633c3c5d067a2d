"""Generation of the media files of examples/smol.

Pictures are PNG files of 192 pixels with a plain background; speech and sounds are FLAC files.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.demo import general_midi, spoken
from examples.demo.media import SOUND_BITS, SPEECH_BITS, save_flac, write_set
from examples.smol.item import Item
from examples.smol.recording_conditions import conditions, record
from examples.smol.recordings import fit_clip
from unimoe_model.data.audio_io import resample
from unimoe_model.extras import needed_by
from unimoe_model.training.progress import ProgressReporter

with needed_by("drawing pictures"):
    from PIL import Image, ImageEnhance

PICTURE_SIDE = 192
_WHITE = (255, 255, 255)
_SMALLEST = 0.6  # relative to the side, in varied pictures
_VARIED_VOICES = frozenset(spoken.WORD_VOICES["train"])


@dataclass
class MediaPlan:
    """Files to be written, by folder, and the input of each.

    Attributes:
        folder: parent of the folders of all sets.
        pictures: item and variant number; variant 0 is not varied.
        phrases: text and eSpeak NG voice.
        speech: recordings of people.
        sounds: recordings.
        notes: program, MIDI key and velocity.
    """

    folder: Path
    pictures: dict[Path, tuple[Item, int]] = field(default_factory=dict)
    phrases: dict[Path, tuple[str, str]] = field(default_factory=dict)
    speech: dict[Path, Item] = field(default_factory=dict)
    sounds: dict[Path, Item] = field(default_factory=dict)
    notes: dict[Path, tuple[int, int, int]] = field(default_factory=dict)

    def picture(self, item: Item, variant: int = 0) -> Path:
        """Returns the file of a picture; the same arguments give the same file."""
        path = self.folder / item.source / f"{item.name}-{variant}.png"
        self.pictures[path] = (item, variant)
        return path

    def phrase(self, text: str, voice: str) -> Path:
        """Returns the file of a phrase spoken by eSpeak NG; training voices are varied."""
        path = self.folder / "espeak" / f"{zlib.crc32(f'{text}/{voice}'.encode()):08x}.flac"
        if self.phrases.setdefault(path, (text, voice)) != (text, voice):
            raise ValueError(f"two phrases have the file {path.name}: {text!r} in voice {voice!r}")
        return path

    def recording(self, item: Item) -> Path:
        """Returns the file of a recording of speech or of a sound."""
        path = self.folder / f"{item.source}-{item.kind}" / f"{item.name}.flac"
        (self.speech if item.kind == "speech" else self.sounds)[path] = item
        return path

    def note(self, program: int, pitch: int, velocity: int) -> Path:
        """Returns the file of a General MIDI note."""
        path = self.folder / "general_midi" / f"{program:03d}-{pitch}-{velocity}.flac"
        self.notes[path] = (program, pitch, velocity)
        return path

    def write(self, reporter: ProgressReporter) -> None:
        """Writes the missing files, each of them atomically.

        Raises:
            MissingAssetError: If a package of the data is not installed.
            OSError: If a file cannot be written.
        """
        speech = partial(save_flac, sample_rate=spoken.SAMPLE_RATE, bits=SPEECH_BITS)
        sound = partial(save_flac, sample_rate=general_midi.SAMPLE_RATE, bits=SOUND_BITS)
        for name, files, make, save in (
            ("pictures", self.pictures, _rendered, _save_png),
            ("phrases", self.phrases, synthesized, speech),
            ("speech of people", self.speech, _spoken, speech),
            ("sounds", self.sounds, _sounds, sound),
            ("notes", self.notes, _played, sound),
        ):
            for folder, own in _by_folder(files).items():
                write_set(f"make {name} ({folder})", own, make, save, reporter)


def render(item: Item, variant: int) -> Image.Image:
    """Renders a picture on a plain background; variant 0 is centred on white, others are varied.

    The same item and variant give the same pixels.

    Args:
        item: item of kind `"image"`.
        variant: determines position, size, mirroring, brightness and background.
    """
    rng = np.random.default_rng([variant, zlib.crc32(f"{item.source}/{item.name}".encode())])
    drawing = item.make()
    share, background, corner = 1.0, _WHITE, np.array([0.5, 0.5])
    if variant:
        share = float(rng.uniform(_SMALLEST, 1))
        background = tuple(rng.integers(150, 256, 3).tolist())
        corner = rng.random(2)
        drawing = drawing.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BICUBIC, expand=True)
        if rng.random() < 0.5:
            drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        drawing = ImageEnhance.Brightness(drawing).enhance(float(rng.uniform(0.8, 1.2)))
    scale = PICTURE_SIDE * share / max(drawing.size)
    size = tuple(max(1, round(side * scale)) for side in drawing.size)
    drawing = drawing.resize(size, Image.Resampling.BICUBIC)
    picture = Image.new("RGB", (PICTURE_SIDE, PICTURE_SIDE), background)
    place = ((PICTURE_SIDE - np.array(size)) * corner).astype(int)
    picture.paste(drawing, tuple(place.tolist()), drawing)
    return picture


def synthesized(phrases: Sequence[tuple[str, str]]) -> Iterator[NDArray[np.float32]]:
    """Speaks phrases; those in training voices under varied conditions, the same each time.

    Args:
        phrases: text and eSpeak NG voice of each.

    Yields:
        `[samples]` at 16 kHz.
    """
    drawn = [conditions(*own) if own[1] in _VARIED_VOICES else None for own in phrases]
    waves = spoken.synthesize_all(
        [(*phrase, own.rate) if own else phrase for phrase, own in zip(phrases, drawn, strict=True)]
    )
    for wave, own in zip(waves, drawn, strict=True):
        yield record(wave, own) if own else wave


def _rendered(items: Iterable[tuple[Item, int]]) -> Iterator[Image.Image]:
    return (render(*item) for item in items)


def _save_png(path: Path, picture: Image.Image) -> None:
    picture.save(path, "PNG")


def _spoken(items: Iterable[Item]) -> Iterator[NDArray[np.float32]]:
    return (resample(*item.make(), spoken.SAMPLE_RATE) for item in items)


def _sounds(items: Iterable[Item]) -> Iterator[NDArray[np.float32]]:
    return (fit_clip(*item.make()) for item in items)


def _played(notes: Iterable[tuple[int, int, int]]) -> Iterator[NDArray[np.float32]]:
    sampler = general_midi.Sampler()
    return (sampler.render(*note) for note in notes)


def _by_folder(files: Mapping[Path, Any]) -> dict[str, dict[Path, Any]]:
    folders: dict[str, dict[Path, Any]] = {}
    for path, content in files.items():
        folders.setdefault(path.parent.name, {})[path] = content
    return folders
