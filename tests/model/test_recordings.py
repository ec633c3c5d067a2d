"""Recordings given as arrays, tensors, files in memory and rows of datasets."""

import io

import numpy as np
import pytest
import torch

from unimoe_model.data.audio_io import load_wav, resample
from unimoe_model.data.media_items import as_recording

RATE = 16_000


def recorded(item):
    return as_recording(item, RATE, "audio")


WAVE = np.sin(np.arange(400) / 9) / 3


@pytest.mark.parametrize("width", [8, 16, 32, 64])
@pytest.mark.parametrize("as_given", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
def test_integers_have_the_full_scale_of_their_width(width, as_given):
    scale = 2.0 ** (width - 1)
    signed = np.round(WAVE * scale).astype(f"int{width}")
    unsigned = signed.view(f"uint{width}") ^ np.array(int(scale), f"uint{width}")
    for samples in (signed, unsigned):
        found = recorded(as_given(samples))
        assert found.dtype == np.float32
        assert np.abs(found - WAVE).max() <= 0.51 / scale + 1e-7


def test_the_ends_of_the_scale():
    assert recorded(np.array([-(2**15), 0, 2**15 - 1], np.int16)).tolist() == [-1, 0, 1 - 2**-15]
    assert recorded(np.array([0, 128, 255], np.uint8)).tolist() == [-1, 0, 1 - 2**-7]
    assert recorded(np.array([1], ">i2")).tolist() == [2**-15]


@pytest.mark.filterwarnings("ignore:Chunk .non-data. not understood")
@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_what_scipy_reads_is_what_the_file_holds(tmp_path, subtype):
    soundfile = pytest.importorskip("soundfile", reason="pip install .[media]")
    wavfile = pytest.importorskip("scipy.io.wavfile", reason="pip install .[media]")
    soundfile.write(tmp_path / "a.wav", WAVE, RATE, subtype=subtype)
    rate, samples = wavfile.read(tmp_path / "a.wav")
    expected = load_wav(tmp_path / "a.wav", RATE)
    assert np.abs(expected).max() > 0.3
    assert np.abs(recorded((samples, rate)) - expected).max() < 1e-6
    assert np.abs(recorded(io.BytesIO((tmp_path / "a.wav").read_bytes())) - expected).max() == 0


@pytest.mark.parametrize(
    "samples",
    [
        WAVE,
        WAVE.astype(np.float16),
        WAVE.tolist(),
        list(WAVE),
        torch.tensor(WAVE),
        torch.tensor(WAVE).bfloat16(),
        torch.tensor(WAVE).half(),
        torch.tensor(WAVE, requires_grad=True),
        torch.tensor(WAVE).repeat_interleave(2)[::2],
        np.repeat(WAVE, 2)[::2],
        WAVE[::-1][::-1],
    ],
)
def test_floats_are_as_they_are(samples):
    assert np.abs(recorded(samples) - WAVE).max() < 2e-3
    assert np.abs(recorded([2.5, -7.0])).tolist() == [2.5, 7]


@pytest.mark.parametrize(
    "rate", [8000, 8000.0, np.float64(8000), np.int64(8000), torch.tensor(8e3)]
)
def test_rates_of_any_type(rate):
    pytest.importorskip("scipy", reason="scipy is not installed: pip install .[media]")
    samples = WAVE.astype(np.float32)
    expected = resample(samples, 8000, RATE)
    assert len(expected) == 800
    assert np.array_equal(recorded((samples, rate)), expected)
    assert np.array_equal(
        recorded({"array": samples, "sampling_rate": rate, "path": "a"}), expected
    )
    assert np.array_equal(resample(samples, rate, float(RATE)), expected)


def test_rows_of_datasets_that_are_not_decoded(tmp_path):
    soundfile = pytest.importorskip("soundfile", reason="pip install .[media]")
    path = tmp_path / "a.wav"
    soundfile.write(path, WAVE.astype(np.float32), RATE)
    expected = load_wav(path, RATE)
    for row in ({"bytes": path.read_bytes(), "path": "b.wav"}, {"bytes": None, "path": str(path)}):
        assert np.array_equal(recorded(row), expected)
    with path.open("rb") as file:
        assert np.array_equal(recorded(file), expected)
        assert np.array_equal(recorded(file), expected)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (None, r"audio clip \(object\) must be of floating point or integers"),
        (object(), "audio clip"),
        ([0, 3, -7], r"audio clip \(list of integers\) must be floats, or an array"),
        (np.array([True]), r"audio clip \(bool\) must be of floating point or integers"),
        (np.array([1j]), r"audio clip \(complex128\)"),
        (np.array(["a"]), r"audio clip \(<U1\)"),
        ([[0.1], [0.1, 0.2]], r"audio clip \(list\) must be samples \[n\]"),
        (np.array([1e300]), "must be finite samples"),
        (torch.ones(3).to_sparse(), r"audio clip \(Tensor\) must be samples \[n\]"),
        ((WAVE, RATE, 1), r"audio clip \(tuple of 3\) must be a pair \(samples, rate\)"),
        ((WAVE, 22050.5), r"audio rate \(22050.5\) must be positive and whole"),
        ((WAVE, 0), r"audio rate \(0\) must be positive"),
        ((WAVE, float("nan")), r"audio rate \(nan\) must be positive"),
        ((WAVE, None), r"audio rate \(NoneType\) must be positive"),
        ((RATE, WAVE), r"audio rate \(ndarray\) must be positive"),
        ({"array": WAVE}, r"audio clip \(keys \['array'\]\) must have a sampling_rate"),
        ({"array": WAVE, "sampling_rate": None}, r"audio rate \(NoneType\) must be"),
    ],
)
def test_what_is_no_recording_is_refused(item, message):
    with pytest.raises(ValueError, match=message):
        recorded(item)


def test_files_without_a_header_are_refused(tmp_path):
    pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
    (tmp_path / "a.raw").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"a\.raw: expected a readable recording"):
        load_wav(tmp_path / "a.raw", RATE)
    with pytest.raises(ValueError, match="<BytesIO>: expected a readable recording"):
        recorded(b"no recording")
