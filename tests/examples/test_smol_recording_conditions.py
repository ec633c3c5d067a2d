"""Conditions under which training speech is spoken and recorded."""

import math

import numpy as np
import pytest

pytest.importorskip("PIL", reason="Pillow is not installed: pip install .[media]")
pytest.importorskip("scipy", reason="scipy is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
from demo_assets import needs

from examples.demo.spoken import SAMPLE_RATE, WORD_VOICES, synthesize, synthesize_all
from examples.smol.media import synthesized
from examples.smol.recording_conditions import (
    FASTEST,
    LONGEST_PAUSE,
    SLOWEST,
    SPEEDS,
    USUAL,
    Conditions,
    conditions,
    record,
)

SECOND = np.arange(SAMPLE_RATE) / SAMPLE_RATE
LOW, HIGH = 1000, 6000  # Hz
TONES = (np.sin(2 * np.pi * LOW * SECOND) + np.sin(2 * np.pi * HIGH * SECOND)).astype(np.float32)


def _energy(wave, frequency):
    spectrum = np.abs(np.fft.rfft(wave)) ** 2
    frequencies = np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE)
    return spectrum[np.abs(frequencies - frequency) < 20].sum() / len(wave)


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("telephone", [False, True])
def test_speed_moves_the_tones_and_a_telephone_drops_the_high_one(speed, telephone):
    wave = record(TONES, Conditions(USUAL, speed, (0.0, 0.0), telephone))
    assert wave.dtype == np.float32
    assert len(wave) == math.ceil(SAMPLE_RATE / speed)
    kept = [_energy(wave, speed * tone) * speed / _energy(TONES, tone) for tone in (LOW, HIGH)]
    assert kept == pytest.approx([1, 0 if telephone else 1], abs=0.1)


def test_pauses_are_silent():
    wave = record(TONES, Conditions(USUAL, 1.0, (0.25, 0.1), telephone=False))
    before, after = SAMPLE_RATE // 4, SAMPLE_RATE // 10
    assert not wave[:before].any()
    assert not wave[-after:].any()
    assert np.array_equal(wave[before:-after], TONES)


def test_an_empty_wave_becomes_its_pauses():
    wave = record(TONES[:0], Conditions(USUAL, 0.9, (0.1, 0.1), telephone=True))
    assert np.array_equal(wave, np.zeros(SAMPLE_RATE // 5, np.float32))


def test_conditions_vary_and_long_phrases_are_not_slowed_down():
    words = [conditions("music", str(voice)) for voice in range(200)]
    rates = [own.rate for own in words]
    assert SLOWEST <= min(rates) < 100
    assert 190 < max(rates) <= FASTEST
    assert {own.speed for own in words} == set(SPEEDS)
    assert 60 < sum(own.telephone for own in words) < 140
    pauses = np.array([own.pauses for own in words])
    assert pauses.min() >= 0
    assert pauses.max() <= LONGEST_PAUSE
    assert pauses.std(0).min() > LONGEST_PAUSE / 5
    sentences = [conditions("is there a blue triangle in the picture?", str(v)) for v in range(200)]
    assert min(own.rate for own in sentences) == USUAL
    assert conditions("music", "0") == words[0]


@needs("espeakng_loader")
def test_only_training_voices_are_varied():
    train, test = WORD_VOICES["train"][0], WORD_VOICES["test"][0]
    varied, plain = synthesized([("music", train), ("music", test)])
    drawn = conditions("music", train)
    (spoken,) = synthesize_all([("music", train, drawn.rate)])
    assert np.array_equal(varied, record(spoken, drawn))
    assert np.array_equal(plain, synthesize("music", test))


@needs("espeakng_loader")
def test_fewer_words_a_minute_take_longer():
    voice = WORD_VOICES["train"][0]
    clips = synthesize_all([("music", voice, rate) for rate in (80, 120, 200)])
    lengths = [len(clip) for clip in clips]
    assert lengths[0] > 1.2 * lengths[1] > 1.4 * lengths[2]
