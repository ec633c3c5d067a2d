"""Reads and writes recordings."""

from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def resample(waveform: NDArray[np.float32], rate: int, new_rate: int) -> NDArray[np.float32]:
    """Changes the sampling rate with a polyphase low-pass filter.

    Args:
        waveform: ``[samples]`` or ``[samples, channels]``.
        rate: samples a second of ``waveform``.
        new_rate: samples a second of the result.

    Returns:
        float32, ``ceil(samples * new_rate / rate)`` samples.

    Raises:
        ValueError: a rate is not positive.
    """
    from scipy.signal import resample_poly

    for name, value in (("rate", rate), ("new_rate", new_rate)):
        if value <= 0:
            raise ValueError(f"{name} ({value}) must be positive")
    if rate == new_rate or waveform.shape[0] == 0:
        return np.asarray(waveform, dtype=np.float32)
    ratio = Fraction(new_rate, rate)
    result = resample_poly(waveform, ratio.numerator, ratio.denominator, axis=0)
    return result.astype(np.float32)


def load_wav(path: str | Path, sample_rate: int) -> NDArray[np.float32]:
    """Reads a recording as one channel at the rate a model expects.

    Args:
        path: a file that libsndfile reads (wav, flac, ogg, mp3 and others).
        sample_rate: samples a second of the result; other rates are resampled.

    Returns:
        ``[samples]`` float32, the channels averaged, full scale at 1.

    Raises:
        ValueError: the file is missing, damaged, no recording, empty, or holds NaN or infinity.
    """
    import soundfile

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a recording such as wav; there is no such file")
    try:
        waveform, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:  # soundfile's own errors are RuntimeErrors
        raise ValueError(f"{path}: expected a readable recording such as wav: {error}") from error
    if waveform.shape[0] == 0:
        raise ValueError(f"{path}: holds no samples, expected at least one")
    if not np.isfinite(waveform).all():
        raise ValueError(f"{path}: holds NaN or infinite samples, expected finite ones")
    return resample(waveform.mean(axis=1), rate, sample_rate)


def save_wav(path: str | Path, waveform: NDArray[np.float32], sample_rate: int) -> None:
    """Writes one channel as a 16-bit wav; samples outside -1..1 are clipped.

    Args:
        path: the file, replaced if it exists.
        waveform: ``[samples]`` floating point, finite.
        sample_rate: samples a second.

    Raises:
        ValueError: another shape or dtype, no samples, NaN or infinity, or no writing there.
    """
    import soundfile

    waveform = np.asarray(waveform)
    if waveform.ndim != 1 or not np.issubdtype(waveform.dtype, np.floating) or not waveform.size:
        raise ValueError(
            f"waveform ({waveform.dtype} of shape {list(waveform.shape)}) must be floating point "
            "of shape [samples] with at least one sample"
        )
    if not np.isfinite(waveform).all():
        raise ValueError("waveform holds NaN or infinite samples, expected finite ones")
    try:
        soundfile.write(path, waveform, sample_rate, subtype="PCM_16", format="WAV")
    except (OSError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: cannot be written as wav: {error}") from error
