"""Numbers of the published encoders and connectors, at tiny sizes; see `test_golden.py`."""

import pytest
import torch
from published import (
    Case,
    clip_config,
    clip_encoder,
    published_chunks,
    whisper_config,
)
from published_checks import (
    OUTPUT,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from unimoe_kernels.testing import relative_error
from unimoe_model.connectors import AudioConnector, ImageConnector, SpeechConnector
from unimoe_model.encoders.beats import BeatsConfig, BeatsEncoder, clip_chunks, coarsened, own_names
from unimoe_model.encoders.clip import LAYER
from unimoe_model.encoders.fbank import beats_fbank
from unimoe_model.encoders.whisper import WhisperWindowEncoder


def test_beats_and_the_audio_connector():
    case = Case("audio_connector")
    encoder = BeatsEncoder.from_checkpoint(case.folder / "beats_checkpoint.pt")
    assert encoder.config == BeatsConfig.from_checkpoint(case.config["beats"])
    in_model = own_names(case.below("weights", "model.audio_tower.audio_tower."))
    assert in_model.keys() == encoder.state_dict().keys()
    for name, value in encoder.state_dict().items():
        assert torch.equal(in_model[name], value), name

    connector = AudioConnector(
        case.config["beats"]["encoder_embed_dim"],
        case.config["hidden_size"],
        case.config["query_tokens_size"],
        {**case.config["qformer"], "hidden_act": "gelu", "layer_norm_eps": 1e-12},
    ).eval()
    weights = case.below("weights", "model.mm_audio_aligner.")
    connector.load_state_dict(
        {name.replace("qformer.qformer.", "qformer."): value for name, value in weights.items()}
    )
    io = case.tensors("io")
    for name, facts in case.checks.items():
        part = {k.removeprefix(f"{name}."): v for k, v in io.items() if k.startswith(f"{name}.")}
        fbank, mask = part["in.fbank"], part["in.padding_mask"]
        frames = coarsened(mask, fbank.shape[1])
        assert torch.equal(frames, part["mid.frame_mask"])
        tokens = coarsened(frames, facts["tokens"])
        assert torch.equal(tokens, part["mid.token_mask"])
        assert tokens.sum() == facts["masked_tokens"]
        assert encoder.num_tokens(mask.shape[1]) == facts["tokens"]
        with torch.no_grad():
            features = encoder.encode_fbank(fbank, mask)
            without = encoder.encode_fbank(fbank)
            hidden = connector.hidden_states(features)
            soft = connector(features)
        assert relative_error(features, part["out.encoder"]) < OUTPUT, name
        assert relative_error(without, part["out.encoder_no_mask"]) < OUTPUT, name
        assert relative_error(hidden, part["mid.qformer_last_hidden"]) < OUTPUT, name
        assert relative_error(soft, part["out.tokens"]) < OUTPUT, name


def test_clip_and_the_image_connector():
    case = Case("image_projector")
    assert case.config["mm_vision_select_layer"] == LAYER
    config = clip_config(case)
    encoder = clip_encoder(config, case.tensors("weights"))
    connector = ImageConnector(config.hidden_size, case.config["hidden_size"])
    connector.projector.load_state_dict(case.below("weights", "model.mm_projector."))
    io = case.tensors("io")
    with torch.no_grad():
        features = encoder(io["in.pixel_values"])
        video = connector(encoder(io["in.video_frames"]))
        assert relative_error(features, io["out.tower_features"]) < OUTPUT
        assert relative_error(connector(features), io["out.image_tokens"]) < OUTPUT
        assert relative_error(video[0], io["out.video_tokens"]) < OUTPUT


def test_pictures_for_clip():
    pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
    case = Case("image_projector")
    encoder = clip_encoder(clip_config(case), case.tensors("weights"))
    given = case.tensors("processor")
    names = sorted(k.removesuffix(".uint8_hwc") for k in given if k.endswith(".uint8_hwc"))
    assert names
    for name in names:
        picture = given[f"{name}.uint8_hwc"]
        for padded, key in ((False, "pixel_values"), (True, "pixel_values_pad")):
            pixels = encoder.pixel_values([picture], pad_to_square=padded)[0]
            assert relative_error(pixels, given[f"{name}.{key}"]) < OUTPUT, (name, padded)


def test_whisper_and_the_speech_connector():
    case = Case("speech_connector")
    whisper = case.config["whisper"]
    encoder = WhisperEncoder(whisper_config(case)).eval()
    encoder.load_state_dict(case.below("weights", "model.audio_tower.audio_tower."))
    connector = SpeechConnector(
        whisper["d_model"],
        case.config["hidden_size"],
        case.config["query_tokens_size"],
        whisper,
    ).eval()
    connector.load_decoder(case.below("weights", "model.mm_audio_aligner.decoder.audio_decoder."))
    connector.projector.load_state_dict(case.below("weights", "model.mm_audio_aligner.projector."))
    io = case.tensors("io")
    with torch.no_grad():
        connector.query_tokens.copy_(case.tensors("weights")["model.query_tokens"])
        chunks = []
        for number, chunk in enumerate(io["in.input_features"][0]):
            if io["in.features_mask"][0, number] == 0:
                break
            features = encoder(chunk[None]).last_hidden_state
            chunks.append(connector(features)[0])
            assert relative_error(features, io[f"out.encoder.chunk{number}"]) < OUTPUT
            assert relative_error(chunks[-1][None], io[f"out.tokens.chunk{number}"]) < OUTPUT
    # Chunks of one file carry its number and follow each other.
    files = io["in.features_mask"][0, : len(chunks)].tolist()
    for file in set(files):
        own = [chunk for chunk, of in zip(chunks, files, strict=True) if of == file]
        assert relative_error(torch.cat(own), io[f"out.audio_file{file}"]) < OUTPUT


def test_audio_features():
    soundfile = pytest.importorskip(
        "soundfile", reason="soundfile is not installed: pip install .[media]"
    )
    case = Case("audio_features")
    expected = case.tensors("features")
    index = expected["frame_index"]
    # The sample's clips, one after the other.
    chunks = []
    for clip in ("clip35.wav", "clip12.wav"):
        samples, rate = soundfile.read(case.folder / clip, dtype="float32")
        assert rate == case.config["fbank"]["sample_frequency"]
        chunks += zip(*clip_chunks(torch.from_numpy(samples)), strict=True)
    stats = case.checks["stats_per_slot"][1]
    for number, (samples, mask) in enumerate(chunks):
        fbank = beats_fbank(samples[None])
        assert list(fbank.shape) == stats[number]["shape"]
        frames = expected[f"sample1.chunk{number}.frames"]
        assert (fbank[0, index] - frames).abs().max() < 1e-3
        assert abs(fbank.double().square().sum() / stats[number]["sq_sum"] - 1) < 1e-4
        padded = mask.nonzero()[:1].flatten().tolist() or [len(mask)]
        assert padded == expected[f"sample1.chunk{number}.first_padded"].tolist()


def test_speech_features():
    soundfile = pytest.importorskip(
        "soundfile", reason="soundfile is not installed: pip install .[media]"
    )
    case, waves = Case("speech_features"), Case("audio_features")
    expected = case.tensors("features")
    index = expected["frame_index"]
    encoder = WhisperWindowEncoder()
    stats = case.checks["stats_per_slot"][1]
    number = 0
    for clip in ("clip35", "clip12"):
        samples, _ = soundfile.read(waves.folder / f"{clip}.wav", dtype="float32")
        assert len(samples) == case.checks["samples"][clip]
        own = encoder.log_mel(samples)
        theirs = published_chunks(samples, encoder.window_samples)
        assert len(own) == len(theirs)
        for window, chunk in zip(own, theirs, strict=True):
            mel = encoder.log_mel(chunk)[0]
            frames = expected[f"sample1.chunk{number}.frames"]
            assert (mel[:, index] - frames).abs().max() < 1e-4
            square = mel.double().square().sum()
            assert abs(square / stats[number]["sq_sum"] - 1) < 1e-4
            # Ours loses no sample: all windows but the first begin one sample earlier.
            first = torch.equal(torch.from_numpy(chunk), torch.from_numpy(samples[: len(chunk)]))
            assert torch.equal(window, mel) == first
            number += 1
    assert number == sum(mask > 0 for mask in case.checks["features_mask"][1])
