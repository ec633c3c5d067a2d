"""Names of the demo's media files, and how each is made.

Pictures are files of the package easy-vqa. Speech and sounds are FLAC, videos animated PNG.
"""

import io
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from examples.demo import easy_vqa, general_midi, spoken, sprites
from examples.demo.limits import DataLimits, draw
from unimoe_model.extras import needed_by
from unimoe_model.training.progress import ProgressReporter

with needed_by("writing sound"):
    import soundfile
with needed_by("writing videos"):
    from PIL import Image

AT_ONCE = 128
"""Items that are made before they are written, which is what an interruption may lose."""

# aiSFX uses the logarithm of a note's power relative to its loudest sample. On 60 notes, features
# of 16-bit files differ by 2 % (median; maximum 31 %), of 24-bit files by 0.002 % (0.02 %).
# Whisper's features of 80 phrases in 16 bits differ by 0.1 % (0.4 %).
SPEECH_BITS, SOUND_BITS = 16, 24
_VIDEO_SEED = 0  # the seed of the run draws other things
_FRAME_MS = 120

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class MediaFiles:
    """The media files of a split, and how each is made, in order.

    Attributes:
        pictures: files of the package easy-vqa, which exist already.
        words: word and voice of each.
        questions: text and voice of each.
        sounds: program, MIDI key and velocity of each.
        videos: number of each clip.
    """

    pictures: list[Path]
    words: dict[Path, tuple[str, str]]
    questions: dict[Path, tuple[str, str]]
    sounds: dict[Path, tuple[int, int, int]]
    videos: dict[Path, int]


def media_files(split: str, folder: Path, seed: int, limits: DataLimits) -> MediaFiles:
    """Names the media files of a split, without reading or writing any.

    Args:
        split: `"train"`, `"validation"` or `"test"`.
        folder: folder of all media other than pictures.
        seed: determines which items are drawn.
        limits: maximum number of items of each set of the split `"train"`.

    Raises:
        ValueError: If the split is unknown.
        MissingAssetError: If a package of the demo's data is not installed.
    """
    limits = limits if split == "train" else DataLimits()
    words = draw(spoken.word_phrases(split), limits.words, seed)
    asked = spoken.question_phrases(easy_vqa.question_texts(), split)
    notes = draw(general_midi.notes_of(split), limits.sounds, seed)
    clips = sprites.SPLIT_SIZES[split]
    clips = range(min(clips, limits.videos or clips))
    return MediaFiles(
        easy_vqa.image_paths(split, limits.pictures),
        _named(folder / "words" / split, "flac", words, _slug),
        _named(folder / "questions" / split, "flac", draw(asked, limits.questions, seed), _slug),
        _named(folder / "sounds" / split, "flac", notes, _note_slug),
        _named(folder / "videos" / split, "png", clips, partial(_clip_slug, split)),
    )


def clip_labels(split: str, index: int) -> tuple[str, str]:
    """Names of the drawing and motion of a clip."""
    return sprites.labels(split, index, _VIDEO_SEED)


def write_media(
    files: MediaFiles, wanted: Collection[Path], split: str, reporter: ProgressReporter
) -> None:
    """Writes missing files, each of them atomically.

    Args:
        files: files of a split.
        wanted: the files to write.
        split: name of the split.
        reporter: shows progress for each set with missing files.

    Raises:
        MissingAssetError: If a package of the demo's data is not installed.
        OSError: If a file cannot be written.
    """

    def write(name: str, own: Mapping[Path, Item], make, save) -> None:
        own = {path: item for path, item in own.items() if path in wanted}
        write_set(f"make {split} {name}", own, make, save, reporter)

    speech = partial(save_flac, sample_rate=spoken.SAMPLE_RATE, bits=SPEECH_BITS)
    write("words", files.words, spoken.synthesize_all, speech)
    write("questions", files.questions, spoken.synthesize_all, speech)
    sound = partial(save_flac, sample_rate=general_midi.SAMPLE_RATE, bits=SOUND_BITS)
    write("sounds", files.sounds, _played, sound)
    write("videos", files.videos, partial(_drawn, split), save_video)


def save_flac(path: Path, samples: NDArray[np.float32], sample_rate: int, bits: int) -> None:
    """Writes one channel as FLAC; samples outside -1..1 are clipped.

    Args:
        path: the file.
        samples: `[samples]`, full scale at 1; rounded to multiples of `2**(1 - bits)`.
        sample_rate: sampling rate in Hz.
        bits: bits per sample, 16 or 24.

    Raises:
        OSError: If the file cannot be written.
    """
    scale = 2.0 ** (bits - 1)
    whole = np.rint(samples.astype(np.float64) * scale).clip(-scale, scale - 1).astype(np.int32)
    content = io.BytesIO()
    # libsndfile writes the highest bits of 32-bit integers.
    soundfile.write(content, whole << (32 - bits), sample_rate, f"PCM_{bits}", format="FLAC")
    path.write_bytes(content.getvalue())


def save_video(path: Path, frames: Tensor) -> None:
    """Writes frames `[n, H, W, 3]` uint8 as a lossless animated PNG.

    Consecutive equal frames are stored as one with a longer duration, which readers repeat.

    Raises:
        OSError: If the file cannot be written.
    """
    images = [Image.fromarray(frame.numpy()) for frame in frames]
    images[0].save(path, "PNG", save_all=True, append_images=images[1:], duration=_FRAME_MS, loop=0)


def _named(
    folder: Path, suffix: str, items: Iterable[Item], slug: Callable[[Item], str]
) -> dict[Path, Item]:
    return {
        folder / f"{number:05d}-{slug(item)}.{suffix}": item for number, item in enumerate(items)
    }


def _slug(parts: Iterable[object]) -> str:
    return re.sub("[^a-z0-9]+", "-", " ".join(map(str, parts)).lower()).strip("-")


def _note_slug(note: tuple[int, int, int]) -> str:
    program, pitch, velocity = note
    return _slug((general_midi.INSTRUMENTS[program], pitch, velocity))


def _clip_slug(split: str, index: int) -> str:
    return _slug(clip_labels(split, index))


def _played(notes: Sequence[tuple[int, int, int]]) -> Iterator[NDArray[np.float32]]:
    sampler = general_midi.Sampler()
    return (sampler.render(*note) for note in notes)


def _drawn(split: str, clips: Sequence[int]) -> Iterator[Tensor]:
    return (sprites.render(split, index, _VIDEO_SEED) for index in clips)


def write_set(
    title: str,
    files: Mapping[Path, Item],
    make: Callable[[list[Item]], Iterable[Made]],
    save: Callable[[Path, Made], None],
    reporter: ProgressReporter,
) -> None:
    """Writes the missing files of a set, in one folder, each of them atomically.

    Args:
        title: title of the progress, which is shown if files are missing.
        files: arguments that each file is made from.
        make: makes the content of several files, in order.
        save: writes the content of one file.
        reporter: shows progress.

    Raises:
        OSError: If a file cannot be written.
    """
    # A power failure may leave files empty, because thousands are not synced one by one.
    missing = [path for path in files if not path.exists() or not path.stat().st_size]
    if not missing:
        return
    missing[0].parent.mkdir(parents=True, exist_ok=True)
    reporter.start(title, len(files), len(files) - len(missing))
    try:
        for start in range(0, len(missing), AT_ONCE):
            paths = missing[start : start + AT_ONCE]
            for path, made in zip(paths, make([files[path] for path in paths]), strict=True):
                unfinished = path.with_name(f".{path.stem}.tmp{path.suffix}")
                save(unfinished, made)
                unfinished.replace(path)
                reporter.advance(1)
        os.sync()
    finally:
        reporter.finish()
