"""Reading and resampling of recordings."""

from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
from numpy.typing import NDArray

from unimoe_model.data.sources import as_source, label
from unimoe_model.extras import needed_by


def resample(
    waveform: NDArray[np.float32], rate: SupportsFloat, new_rate: SupportsFloat
) -> NDArray[np.float32]:
    """Changes the sampling rate with a polyphase low-pass filter.

    Args:
        waveform: `[samples]` or `[samples, channels]`, floating point.
        rate: sampling rate of `waveform` in Hz, integral in value.
        new_rate: sampling rate of the result in Hz, integral in value.

    Returns:
        float32, `ceil(samples * new_rate / rate)` samples.

    Raises:
        ValueError: If a rate is not a positive integer.
    """
    rate, new_rate = whole_rate(rate, "rate"), whole_rate(new_rate, "new_rate")
    if rate == new_rate or waveform.shape[0] == 0:
        return np.asarray(waveform, dtype=np.float32)
    with needed_by("resampling sound"):
        from scipy.signal import resample_poly

    ratio = Fraction(new_rate, rate)
    up, down = ratio.numerator, ratio.denominator
    low_pass = _low_pass(up, down)
    if np.issubdtype(waveform.dtype, np.floating):
        low_pass = low_pass.astype(waveform.dtype)
    return resample_poly(waveform, up, down, axis=0, window=low_pass).astype(np.float32)


@lru_cache(maxsize=16)
def _low_pass(up: int, down: int) -> NDArray[np.float64]:
    """The filter of `resample_poly`, cached because designing it in each call is slow."""
    with needed_by("resampling sound"):
        from scipy.signal import firwin

    widest = max(up, down)
    return firwin(20 * widest + 1, 1 / widest, window=("kaiser", 5.0))


def whole_rate(rate: SupportsFloat, name: str) -> int:
    """Converts a sampling rate, which datasets may store as a float, to an int.

    Raises:
        ValueError: If the rate is not a positive integer.
    """
    try:
        value = float(rate)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} ({type(rate).__name__}) must be positive and whole") from error
    if not (value >= 1 and value.is_integer()):
        raise ValueError(f"{name} ({rate}) must be positive and whole")
    return int(value)


def full_scale(samples: NDArray, name: str) -> NDArray[np.float32]:
    """Converts samples to float32, scaling integers so that full scale is 1.

    Args:
        samples: samples of any shape: floating point, which is not scaled; or integers of any
            width, where unsigned ones have silence in the middle, as in PCM files.
        name: name of the samples in error messages.

    Returns:
        float32, in the shape of `samples`.

    Raises:
        ValueError: If `samples` have another dtype.
    """
    if samples.dtype.kind in "iu":
        info = np.iinfo(samples.dtype)
        scale = 2.0 ** (info.bits - 1)
        silence = scale if info.min == 0 else 0.0
        return ((samples.astype(np.float64) - silence) / scale).astype(np.float32)
    if samples.dtype.kind != "f":
        raise ValueError(f"{name} ({samples.dtype}) must be of floating point or integers")
    with np.errstate(over="ignore"):  # values beyond the range of float32 become infinite
        return samples.astype(np.float32)


def load_wav(source: Any, sample_rate: int) -> NDArray[np.float32]:
    """Reads a recording as one channel at a given sampling rate.

    Args:
        source: a file that libsndfile reads (wav, flac, ogg, mp3 and others): a path, or any other
            form that `as_source` accepts.
        sample_rate: sampling rate of the result in Hz; other rates are resampled.

    Returns:
        `[samples]` float32, averaged over channels, full scale at 1.

    Raises:
        ValueError: If the file is missing, damaged, not a recording, empty, or has NaN or infinite
            samples.
        ModuleNotFoundError: If soundfile or SciPy is not installed.
    """
    with needed_by("reading sound"):
        import soundfile

    source = as_source(source)
    name = label(source)
    if isinstance(source, Path) and not source.is_file():
        raise ValueError(f"{name}: expected a recording such as wav; there is no such file")
    try:
        waveform, rate = soundfile.read(source, dtype="float32", always_2d=True)
    # soundfile's own errors are RuntimeErrors; headerless files raise TypeError.
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected a readable recording such as wav: {error}") from error
    if waveform.shape[0] == 0:
        raise ValueError(f"{name}: holds no samples, expected at least one")
    if not np.isfinite(waveform).all():
        raise ValueError(f"{name}: holds NaN or infinite samples, expected finite ones")
    return resample(waveform.mean(axis=1), rate, sample_rate)
