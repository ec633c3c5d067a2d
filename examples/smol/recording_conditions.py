"""Varied recording conditions of synthetic speech: speed, and the bandwidth of a telephone."""

import random

import numpy as np
from numpy.typing import NDArray

from examples.demo.spoken import SAMPLE_RATE
from unimoe_model.data.audio_io import resample

SPEEDS = (0.9, 1.0, 1.1)
"""Speed factors, which change tempo and pitch together, of Ko et al. 2015, "Audio augmentation for
speech recognition"."""
TELEPHONE_RATE = 8_000


def vary(wave: NDArray[np.float32], key: str) -> NDArray[np.float32]:
    """Returns speech at one of `SPEEDS`, half of the time without what is above 4 kHz.

    Args:
        wave: `[samples]` at 16 kHz.
        key: determines speed and bandwidth.

    Returns:
        float32 `[samples]` at 16 kHz, whose number depends on the speed.
    """
    rng = random.Random(f"recording conditions/{key}")
    wave = resample(wave, round(rng.choice(SPEEDS) * SAMPLE_RATE), SAMPLE_RATE)
    if rng.random() < 0.5:
        wave = resample(resample(wave, SAMPLE_RATE, TELEPHONE_RATE), TELEPHONE_RATE, SAMPLE_RATE)
    return wave
