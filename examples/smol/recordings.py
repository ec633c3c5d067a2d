"""Recordings of sounds, cut into clips of equal length."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from examples.demo.general_midi import CLIP_SAMPLES, SAMPLE_RATE
from unimoe_model.data.audio_io import resample
from unimoe_model.extras import needed_by

with needed_by("reading sounds"):
    import soundfile

MOST_CLIPS = 3
_SECONDS = CLIP_SAMPLES / SAMPLE_RATE
_QUIETEST = 1e-3  # relative to full scale; some files are silent

Reader = Callable[[], tuple[NDArray[np.float32], int]]


def read_mono(path: Path) -> tuple[NDArray[np.float32], int]:
    """Returns the samples `[samples]` of a recording, averaged over channels, and their rate."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return samples.mean(axis=1), rate


def is_audible(path: Path) -> bool:
    """Returns whether a recording exceeds a thousandth of full scale."""
    samples, _ = read_mono(path)
    return samples.size > 0 and float(np.abs(samples).max()) > _QUIETEST


def clips_of(path: Path) -> Iterator[Reader]:
    """Returns readers of a recording's clips of 1.83 s: one, or up to three if it is longer."""
    info = soundfile.info(path)
    count = min(MOST_CLIPS, max(1, int(info.duration // _SECONDS)))
    return (_clip_reader(path, number) for number in range(count))


def fit_clip(samples: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    """Returns `[80896]` samples at 44.1 kHz, truncated or padded with silence."""
    samples = resample(samples, rate, SAMPLE_RATE)[:CLIP_SAMPLES]
    return np.pad(samples, (0, CLIP_SAMPLES - len(samples)))


def _clip_reader(path: Path, number: int) -> Reader:
    def read() -> tuple[NDArray[np.float32], int]:
        samples, rate = read_mono(path)
        start = round(number * _SECONDS * rate)
        return samples[start : start + round(_SECONDS * rate)], rate

    return read
