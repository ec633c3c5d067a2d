"""Speed and bandwidth of training speech."""

import math

import numpy as np
import pytest

pytest.importorskip("PIL", reason="Pillow is not installed: pip install .[media]")
pytest.importorskip("scipy", reason="scipy is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
from demo_assets import needs

from examples.demo.spoken import SAMPLE_RATE, WORD_VOICES, synthesize
from examples.smol.media import synthesized
from examples.smol.recording_conditions import SPEEDS, vary

SECOND = np.arange(SAMPLE_RATE) / SAMPLE_RATE
LOW, HIGH = 1000, 6000  # Hz
TONES = (np.sin(2 * np.pi * LOW * SECOND) + np.sin(2 * np.pi * HIGH * SECOND)).astype(np.float32)


def _power(wave, frequency):
    spectrum = np.abs(np.fft.rfft(wave)) ** 2
    frequencies = np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE)
    return spectrum[np.abs(frequencies - frequency) < 20].sum() / len(wave) ** 2


def test_speeds_move_the_tones_and_half_of_the_waves_lose_the_high_one():
    counts = dict.fromkeys(SPEEDS, 0)
    telephones = 0
    for key in range(60):
        wave = vary(TONES, str(key))
        assert wave.dtype == np.float32
        (speed,) = (own for own in SPEEDS if len(wave) == math.ceil(SAMPLE_RATE / own))
        counts[speed] += 1
        assert _power(wave, speed * LOW) == pytest.approx(_power(TONES, LOW), rel=0.1)
        high = _power(wave, speed * HIGH) / _power(TONES, HIGH)
        assert high < 0.01 or high == pytest.approx(1, rel=0.1)
        telephones += high < 0.01
    assert min(counts.values()) > 10
    assert 20 < telephones < 40


def test_the_key_determines_the_conditions():
    assert np.array_equal(vary(TONES, "key"), vary(TONES, "key"))


def test_an_empty_wave_stays_empty():
    assert vary(TONES[:0], "key").shape == (0,)


@needs("espeakng_loader")
def test_only_training_voices_are_varied():
    train, test = WORD_VOICES["train"][0], WORD_VOICES["test"][0]
    phrases = [("music", train), ("music", test)]
    varied, plain = synthesized(phrases)
    assert np.array_equal(varied, vary(synthesize("music", train), f"music/{train}"))
    assert np.array_equal(plain, synthesize("music", test))
