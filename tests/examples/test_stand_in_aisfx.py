"""aiSFX."""

import numpy as np
import pytest
import torch
from demo_assets import needs
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.stand_ins import aisfx
from examples.stand_ins.aisfx import AisfxAudioEncoder
from examples.stand_ins.assets import asset_file
from unimoe_kernels.testing import relative_error

needs_aisfx = needs("aisfx")
RANDOM_ENCODER = AisfxAudioEncoder()


@pytest.fixture(scope="module")
def sound() -> AisfxAudioEncoder:
    return AisfxAudioEncoder.pretrained()


@needs_aisfx
def test_damaged_checkpoint_is_refused(tmp_path, monkeypatch):
    whole = asset_file("aisfx", "models", "checkpoint.pth").read_bytes()
    path = tmp_path / "checkpoint.pth"
    monkeypatch.setattr(aisfx, "asset_file", lambda *parts: path)
    for content in (b"", whole[:1000], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint\.pth: expected the checkpoint of aiSFX"):
            AisfxAudioEncoder.pretrained()
    torch.save(({"embedding_net.conv_block1.bn1.bias": torch.zeros(64)}, {}), path)
    with pytest.raises(ValueError, match="Missing key"):
        AisfxAudioEncoder.pretrained()


def test_mel_filters_are_triangles_of_unit_sum():
    filters = aisfx.mel_filters().double()
    assert filters.shape == (1025, 96)
    assert (filters >= 0).all()
    assert torch.allclose(filters.sum(dim=0), torch.ones(96, dtype=torch.float64), atol=1e-6)
    # HTK's scale: 1000 Hz is mel 1000, so the middle band lies at half of mel(22,050 Hz).
    top = 2595 * np.log10(1 + 22_050 / 700)
    centres = 700 * (10 ** (top * np.arange(1, 97) / 97 / 2595) - 1)
    bins = torch.arange(1025, dtype=torch.float64) * 22_050 / 1024
    means = (filters * bins[:, None]).sum(dim=0)
    # A triangle's mean lies above its peak, as the scale widens upwards.
    assert relative_error(means[30:], torch.from_numpy(centres[30:])) < 0.05


def test_log_mel_follows_its_formula_and_ignores_level():
    encoder = RANDOM_ENCODER
    time = torch.arange(20_000, dtype=torch.float64) / 44_100
    tone = torch.sin(2 * torch.pi * 1000 * time)
    waveform = (0.25 * tone + 0.01 * torch.randn(20_000).double())[None]
    found = encoder.log_mel(waveform.float())
    assert found.shape == (1, 20, 96)

    padded = np.pad((waveform[0] / waveform.abs().max()).numpy(), 1024)
    frames = np.stack([padded[i * 1024 : i * 1024 + 2048] for i in range(20)])
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(2048) / 2048)
    power = np.abs(np.fft.rfft(frames * hann)) ** 2
    expected = np.log10(1 + 1e4 * power @ aisfx.mel_filters().double().numpy()) / 9.457798957824707
    assert relative_error(found[0], torch.from_numpy(expected)) < 1e-5
    assert 0.9 < found.max() < 1.01
    assert relative_error(encoder.log_mel(0.001 * waveform.float()), found) < 1e-5
    assert not encoder.log_mel(torch.zeros(1, 20_000)).any()


@needs_aisfx
def test_aisfx_equals_its_layers_in_float64(sound):
    waveforms = torch.randn(2, 20 * 1024)
    state = {key: value.double() for key, value in sound.state_dict().items()}
    x = sound.log_mel(waveforms).double()[:, None]
    for block in range(1, 5):
        for layer in (1, 2):
            name = f"conv_block{block}"
            x = torch.nn.functional.conv2d(x, state[f"{name}.conv{layer}.weight"], padding=1)
            x = torch.nn.functional.batch_norm(
                x,
                state[f"{name}.bn{layer}.running_mean"],
                state[f"{name}.bn{layer}.running_var"],
                state[f"{name}.bn{layer}.weight"],
                state[f"{name}.bn{layer}.bias"],
            ).clamp_min(0)
        if block < 4:
            x = torch.nn.functional.max_pool2d(x, 2)
    expected = x.mean(dim=3).transpose(1, 2)
    found = sound(waveforms)
    assert found.shape == (2, 2, 512)
    assert expected.abs().mean() > 0.1
    assert relative_error(found, expected) < 1e-4


@given(samples=st.integers(7 * 1024, 18_000), batch=st.integers(0, 2))
@settings(max_examples=8)
def test_aisfx_frames_are_eight_hops(samples, batch):
    expected = (batch, (1 + samples // 1024) // 8, 512)
    assert RANDOM_ENCODER(torch.zeros(batch, samples)).shape == expected


@pytest.mark.parametrize(
    ("waveforms", "message"),
    [
        (torch.zeros(44_100), r"waveforms .*\[44100\].* must be floating point of shape \[B"),
        (torch.zeros(1, 44_100, dtype=torch.int16), r"waveforms \(torch\.int16"),
        (torch.zeros(1, 7167), r"samples \(7167\) must be at least 7168"),
    ],
)
def test_aisfx_refuses_bad_waveforms(waveforms, message):
    with pytest.raises(ValueError, match=message):
        RANDOM_ENCODER(waveforms)


def test_recordings_of_any_length_are_encoded_together(monkeypatch):
    monkeypatch.setattr(aisfx, "PIECE_SAMPLES", 50_000)
    rng = np.random.default_rng(0)
    lengths = [40_000, 30_000, 40_000, 50_000 + 20_000, 40_000, 50_000 + 100]
    recordings = [rng.standard_normal(length).astype(np.float32) for length in lengths]
    together = RANDOM_ENCODER.encode_recordings(recordings)
    assert [len(pieces) for pieces in together] == [1, 1, 1, 2, 1, 1]
    assert [pieces[-1].shape[0] for pieces in together] == [5, 3, 5, 2, 5, 6]
    for recording, pieces in zip(recordings, together, strict=True):
        for piece, alone in zip(pieces, RANDOM_ENCODER.encode_recording(recording), strict=True):
            assert piece.dtype == torch.float32
            assert relative_error(piece, alone.double()) < 1e-5
    assert RANDOM_ENCODER.encode_recordings([]) == []
