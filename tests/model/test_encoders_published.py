"""The paper's encoders from disk, in the processor: numbers of soft tokens as published."""

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, WhisperConfig, WhisperModel

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
from unimoe_kernels.testing import relative_error
from unimoe_model.encoders import ENCODERS, build_encoder
from unimoe_model.encoders.beats import BeatsConfig, BeatsEncoder
from unimoe_model.encoders.published import FOLDER_VARIABLE
from unimoe_model.encoders.whisper import WhisperWindowEncoder
from unimoe_model.processing import UniMoEProcessor

RATE = 16_000
WHISPER = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 8,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 8,
    "num_mel_bins": 20,
    "vocab_size": 30,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "decoder_start_token_id": 0,
}
CLIP = {
    "image_size": 28,
    "patch_size": 14,
    "hidden_size": 12,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
BEATS = BeatsConfig(
    embed_dim=8,
    encoder_embed_dim=10,
    encoder_layers=1,
    encoder_ffn_embed_dim=8,
    encoder_attention_heads=2,
    conv_pos=4,
    conv_pos_groups=2,
)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Folders of a CLIP and a Whisper; a BEATs in memory stands for its file."""
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**CLIP)).save_pretrained(tmp_path / "clip")
    WhisperModel(WhisperConfig(**WHISPER)).save_pretrained(tmp_path / "whisper")
    beats = BeatsEncoder(BEATS)
    monkeypatch.setattr(
        "unimoe_model.encoders.beats.BeatsEncoder.from_checkpoint", lambda path: beats
    )
    (tmp_path / "beats.pt").touch()
    monkeypatch.setattr("unimoe_model.processing._BUILT", {})
    return {
        "vision_encoder": str(tmp_path / "clip"),
        "speech_encoder": str(tmp_path / "whisper"),
        "audio_encoder": str(tmp_path / "beats.pt"),
    }


@pytest.fixture
def processor(folders, tiny_config, tokenizer):
    config = tiny_config(**folders, vision_num_tokens=4, speech_max_frames=1500, video_num_frames=8)
    return UniMoEProcessor.from_config(config, tokenizer)


def recording(seconds, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal(seconds * RATE).astype(np.float32)


def test_long_recordings_take_a_chunk_every_30_seconds(processor, tiny_model, folders):
    media = {"speech": [recording(95), recording(7, seed=1)], "audio": [recording(61, seed=2)]}
    inputs = processor("<speech> and <audio> and <speech>", **media)
    assert inputs["speech_features"].shape == (4 + 1, 1500, 16)
    # 2998 frames of 128 bands in patches of 16 x 16.
    assert inputs["audio_features"].shape == (3, 187 * 8, 10)
    assert "audio_features_mask" not in inputs
    ids = inputs["input_ids"][0].tolist()
    placeholders = {k: processor.tokenizer.convert_tokens_to_ids(f"<{k}>") for k in media}
    assert ids.count(placeholders["speech"]) == 5 * 4
    assert ids.count(placeholders["audio"]) == 3 * 2
    model = tiny_model(vision_num_tokens=4, speech_max_frames=1500)
    assert torch.isfinite(model(**inputs).logits).all()


def test_windows_lose_no_sample():
    torch.manual_seed(0)
    encoder = WhisperWindowEncoder(WhisperConfig(**WHISPER))
    samples = recording(61)
    windows = encoder.encode_recording(samples)
    assert len(windows) == 3
    second = encoder.encode_recording(samples[30 * RATE : 60 * RATE])
    assert torch.equal(windows[1], second[0])
    with pytest.raises(ValueError, match=r"max_rows \(1499\) must be at least 1500"):
        encoder.encode_recording(samples, 1499)
    with pytest.raises(ValueError, match=r"samples \(float32, shape \[0\]\)"):
        encoder.encode_recording(samples[:0])
    with pytest.raises(ValueError, match=r"samples \(int16, .*must be floating point"):
        encoder.encode_recording(np.ones(9, np.int16))


def test_pictures_and_videos_through_clip(processor, folders):
    generator = torch.Generator().manual_seed(0)
    clip = torch.randint(0, 256, (20, 30, 40, 3), dtype=torch.uint8, generator=generator)
    inputs = processor("<video><image>", videos=[clip], images=[clip[3]])
    assert inputs["video_features"].shape == (1, 8, 4, 12)
    # Every second frame of 20, as published: 20 // 8.
    single = processor("<image>", images=[clip[2 * 3]])["image_features"]
    assert relative_error(inputs["video_features"][0, 3], single[0]) < 1e-6
    tower = CLIPVisionModel.from_pretrained(folders["vision_encoder"])
    pixels = build_encoder(folders["vision_encoder"], "vision").pixel_values([clip[3]])
    hidden = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert relative_error(inputs["image_features"], hidden) < 1e-6


def test_encoders_by_the_folder_of_the_variable(folders, monkeypatch, tmp_path):
    (tmp_path / "clip").rename(tmp_path / "clip-vit-large-patch14-336")
    (tmp_path / "whisper").rename(tmp_path / "whisper-small")
    (tmp_path / "beats.pt").rename(tmp_path / "BEATs_iter3_plus_AS2M.pt")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    assert build_encoder("clip-vit-large-patch14-336", "vision").feature_size == 12
    assert build_encoder("whisper-small", "speech").feature_size == 16
    assert build_encoder("beats-iter3-plus-as2m", "audio").feature_size == 10
    monkeypatch.delenv(FOLDER_VARIABLE)
    with pytest.raises(FileNotFoundError, match=r"BEATs_iter3_plus_AS2M.pt must be in the folder"):
        build_encoder("beats-iter3-plus-as2m", "audio")


def test_unknown_encoders():
    assert {"clip-vit-large-patch14-336", "whisper-small", "beats-iter3-plus-as2m"} <= set(ENCODERS)
    for name in ("", "no/such/folder"):
        with pytest.raises(ValueError, match=rf"speech encoder \('{name}'\) must be one of"):
            build_encoder(name, "speech")


def test_a_folder_of_another_model_is_refused(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"model_type \(None\) .*empty' must be whisper"):
        build_encoder(str(tmp_path / "empty"), "speech")
    message = r"model_type \('whisper'\) in config.json of '.*whisper' must be clip or clip_vision"
    with pytest.raises(ValueError, match=message):
        build_encoder(folders["speech_encoder"], "vision")
    message = r"model_type \('clip_vision_model'\) in config.json of '.*clip' must be whisper"
    with pytest.raises(ValueError, match=message):
        build_encoder(folders["vision_encoder"], "speech")
