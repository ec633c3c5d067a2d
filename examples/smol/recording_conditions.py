"""Varied conditions of synthetic speech: tempo, pitch, pauses, and the bandwidth of a telephone.

Single words of eSpeak NG take 0.4 s, from the first sample to the last. Those of a person take
0.9 s, of which 0.2 s are pauses before and after.
"""

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from examples.demo.spoken import SAMPLE_RATE
from unimoe_model.data.audio_io import resample

SLOWEST, USUAL, FASTEST = 80, 175, 200
"""Words per minute; eSpeak NG's own rate is the one in the middle."""
LONGEST = 2.2
"""Seconds: rates below the usual one are drawn only if the phrase's words take no longer."""
SPEEDS = (0.9, 1.0, 1.1)
"""Speed factors, which change tempo and pitch together, of Ko et al. 2015, "Audio augmentation for
speech recognition"."""
LONGEST_PAUSE = 0.25
"""Maximum duration in seconds of the pauses before and after the speech."""
TELEPHONE_RATE = 8_000


@dataclass(frozen=True)
class Conditions:
    """Conditions under which a phrase is spoken and recorded.

    Attributes:
        rate: words per minute.
        speed: factor of tempo and pitch.
        pauses: seconds before and after the speech.
        telephone: whether frequencies above 4 kHz are missing.
    """

    rate: int
    speed: float
    pauses: tuple[float, float]
    telephone: bool


def conditions(text: str, voice: str) -> Conditions:
    """Draws conditions; the same arguments give the same ones.

    Args:
        text: the phrase.
        voice: eSpeak NG voice.
    """
    rng = random.Random(f"recording conditions/{text}/{voice}")
    slowest = min(max(SLOWEST, round(60 * len(text.split()) / LONGEST)), USUAL)
    return Conditions(
        rate=rng.randint(slowest, FASTEST),
        speed=rng.choice(SPEEDS),
        pauses=(rng.uniform(0, LONGEST_PAUSE), rng.uniform(0, LONGEST_PAUSE)),
        telephone=rng.random() < 0.5,
    )


def record(wave: NDArray[np.float32], drawn: Conditions) -> NDArray[np.float32]:
    """Applies all conditions but the rate to speech.

    Args:
        wave: `[samples]` at 16 kHz, spoken at the rate of `drawn`.
        drawn: the conditions.

    Returns:
        float32 `[samples]` at 16 kHz, whose number depends on speed and pauses.
    """
    wave = resample(wave, round(drawn.speed * SAMPLE_RATE), SAMPLE_RATE)
    wave = np.pad(wave, [round(pause * SAMPLE_RATE) for pause in drawn.pauses])
    if drawn.telephone:
        wave = resample(resample(wave, SAMPLE_RATE, TELEPHONE_RATE), TELEPHONE_RATE, SAMPLE_RATE)
    return wave
