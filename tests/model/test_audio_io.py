"""Recordings from and to files, and their sampling rates."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="scipy is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
import soundfile

from unimoe_model.data.audio_io import load_wav, resample


def tone(frequency: float, seconds: float, rate: int) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)).astype(
        np.float32
    )


def loudest_frequency(waveform: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    return float(spectrum.argmax() * rate / len(waveform))


def test_wav_comes_back(tmp_path):
    waveform = tone(440, 0.3, 16_000)
    soundfile.write(tmp_path / "a.wav", waveform, 16_000)
    back = load_wav(tmp_path / "a.wav", 16_000)
    assert back.dtype == np.float32
    assert np.abs(back - waveform).max() < 1e-4
    higher = load_wav(tmp_path / "a.wav", 44_100)
    assert len(higher) == 13_230
    assert abs(loudest_frequency(higher, 44_100) - 440) < 4


def test_channels_are_averaged(tmp_path):
    left, right = tone(300, 0.1, 8000), tone(700, 0.1, 8000)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 8000)
    assert np.abs(load_wav(tmp_path / "a.wav", 8000) - (left + right) / 2).max() < 1e-4


@given(
    samples=st.integers(0, 500),
    rates=st.tuples(*[st.sampled_from([8000, 16_000, 22_050, 44_100])] * 2),
)
def test_resample_length_and_level(samples, rates):
    rate, new_rate = rates
    result = resample(np.ones(samples, dtype=np.float32), rate, new_rate)
    assert result.dtype == np.float32
    assert len(result) == -(-samples * new_rate // rate)
    if samples >= 300:
        middle = result[len(result) // 3 : 2 * len(result) // 3]
        assert np.abs(middle - 1).max() < 0.02


def test_bad_recordings_are_named(tmp_path):
    (tmp_path / "text.wav").write_text("no recording")
    (tmp_path / "nothing.wav").write_bytes(b"")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 8000)
    soundfile.write(tmp_path / "nan.wav", np.full(9, np.nan, np.float32), 8000, subtype="FLOAT")
    for name, message in {
        "absent.wav": "expected a recording such as wav; there is no such file",
        "text.wav": "expected a readable recording",
        "nothing.wav": "expected a readable recording",
        "empty.wav": "holds no samples",
        "nan.wav": "holds NaN or infinite samples",
    }.items():
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            load_wav(tmp_path / name, 16_000)
    with pytest.raises(ValueError, match="there is no such file"):
        load_wav(tmp_path, 16_000)


def test_rates_must_be_positive():
    with pytest.raises(ValueError, match=r"new_rate \(0\) must be positive"):
        resample(np.zeros(3, np.float32), 8000, 0)
