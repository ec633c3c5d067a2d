"""BEATs beyond the numbers of test_golden*.py: shapes, masks, positions and refused input."""

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from unimoe_kernels.testing import relative_error
from unimoe_model.encoders.beats import (
    CHUNK_SAMPLES,
    BeatsConfig,
    BeatsEncoder,
    clip_chunks,
    coarsened,
    relative_buckets,
)
from unimoe_model.encoders.clip import ClipImageEncoder
from unimoe_model.encoders.fbank import beats_fbank, num_frames

TINY = BeatsConfig(
    embed_dim=12,
    encoder_layers=2,
    encoder_embed_dim=16,
    encoder_ffn_embed_dim=24,
    encoder_attention_heads=2,
    conv_pos=8,
    conv_pos_groups=2,
    num_buckets=8,
    max_distance=20,
)


def tiny():
    torch.manual_seed(0)
    encoder = BeatsEncoder(TINY).double()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return encoder


def published(encoder):
    """State dict under the names of the checkpoints."""
    state = {}
    for name, value in encoder.state_dict().items():
        if name == "relative_attention_bias.weight":
            for layer in range(len(encoder.layers)):
                state[f"encoder.layers.{layer}.self_attn.{name}"] = value
        elif name == "pos_conv.weight":
            state["encoder.pos_conv.0.weight_v"] = 3 * value
            state["encoder.pos_conv.0.weight_g"] = value.norm(dim=(0, 1), keepdim=True)
        elif name.startswith("pos_conv."):
            state["encoder." + name.replace("pos_conv.", "pos_conv.0.")] = value
        elif name.startswith("encoder_layer_norm."):
            state[name.replace("encoder_", "encoder.")] = value
        else:
            state["encoder." + name if name.startswith("layers.") else name] = value
    return state


def cfg():
    known = {name: getattr(TINY, name) for name in TINY.__dataclass_fields__}
    return known | {
        "activation_fn": "gelu",
        "layer_norm_first": False,
        "deep_norm": True,
        "relative_position_embedding": True,
        "gru_rel_pos": True,
        "finetuned_model": False,
    }


def test_fbank_is_that_of_transformers():
    waveform = np.random.default_rng(0).normal(size=4321) / 4
    expected = spectrogram(
        waveform * 2**15,
        window_function(400, "povey", periodic=False),
        frame_length=400,
        hop_length=160,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        mel_filters=mel_filter_bank(
            257, 128, 20, 8000, 16000, mel_scale="kaldi", triangularize_in_mel_space=True
        ),
        log_mel="log",
        mel_floor=1.192092955078125e-07,
        remove_dc_offset=True,
    ).T
    fbank = beats_fbank(torch.from_numpy(waveform)[None])[0]
    assert fbank.shape == (num_frames(4321), 128)
    assert relative_error(fbank, (torch.from_numpy(expected) - 15.41663) / 13.11164) < 1e-6


@pytest.mark.parametrize("samples", [0, 399, 400, 560])
def test_fbank_of_short_clips(samples):
    assert beats_fbank(torch.zeros(2, samples)).shape == (2, num_frames(samples), 128)


def test_what_lies_in_the_padding_changes_nothing():
    encoder = tiny()
    clip = torch.randn(1, 16_000, dtype=torch.float64) / 4
    mask = torch.zeros(1, 16_000, dtype=torch.bool)
    mask[:, 8000:] = True
    y = encoder(clip, mask)
    assert y.shape == (1, encoder.num_tokens(16_000), 16)
    kept = ~coarsened(coarsened(mask, num_frames(16_000)), y.shape[1])[0]
    # Of the last time that is kept, only some bands may be.
    times = -(-int(kept.sum()) // 8)
    assert 2 < times < len(kept) // 8
    # Behind the last frame of the last token that is kept.
    clip[:, (16 * times - 1) * 160 + 400 :] = 1
    assert relative_error(encoder(clip, mask)[:, kept], y[:, kept]) < 1e-12
    assert relative_error(encoder(clip)[:, kept], y[:, kept]) > 1e-3


def test_buckets_are_exact_nearby_and_bounded_far_away():
    buckets = relative_buckets(torch.arange(-400, 401), 8, 20)
    assert buckets[400] == 0
    assert buckets[401] == 5
    assert buckets[399] == 1
    assert buckets[-1] == 7
    assert buckets[0] == 3


def test_published_checkpoint_is_read(tmp_path):
    encoder = tiny()
    torch.save({"cfg": cfg(), "model": published(encoder)}, tmp_path / "beats.pt")
    again = BeatsEncoder.from_checkpoint(tmp_path / "beats.pt")
    assert not again.training
    clip = torch.randn(2, 9000) / 4
    assert relative_error(again.double()(clip.double()), encoder(clip.double())) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["cfg"].update(deep_norm=False), r"cfg\['deep_norm'\] \(False\) must be True"),
        (lambda c: c["cfg"].pop("num_buckets"), r"cfg has no \['num_buckets'\]"),
        (lambda c: c.pop("cfg"), "cfg"),
        (lambda c: c["model"].pop("encoder.layers.1.fc1.bias"), r"layers\.1\.fc1\.bias"),
        (lambda c: c["model"].update(extra=torch.ones(1)), "extra"),
        (lambda c: c["model"].pop("encoder.pos_conv.0.weight_g"), "pos_conv"),
        (
            lambda c: c["model"].update(
                {"encoder.layers.1.self_attn.relative_attention_bias.weight": torch.ones(8, 2)}
            ),
            "differs from that of another layer",
        ),
    ],
)
def test_other_checkpoints_are_refused(tmp_path, change, message):
    checkpoint = {"cfg": cfg(), "model": published(tiny())}
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "beats.pt")
    with pytest.raises(ValueError, match=message):
        BeatsEncoder.from_checkpoint(tmp_path / "beats.pt")


def test_damaged_and_missing_checkpoints(tmp_path):
    (tmp_path / "beats.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="expected a checkpoint of BEATs"):
        BeatsEncoder.from_checkpoint(tmp_path / "beats.pt")
    with pytest.raises(FileNotFoundError):
        BeatsEncoder.from_checkpoint(tmp_path / "none.pt")


def test_clips_are_cut_into_chunks():
    clip = torch.arange(1.0, CHUNK_SAMPLES + 11)
    chunks, mask = clip_chunks(clip)
    assert chunks.shape == mask.shape == (2, CHUNK_SAMPLES)
    assert torch.equal(chunks.flatten()[: len(clip)], clip)
    assert chunks[1, 10:].eq(clip[-1]).all()
    assert mask.sum() == CHUNK_SAMPLES - 10
    whole, mask = clip_chunks(clip[:CHUNK_SAMPLES])
    assert len(whole) == 1
    assert not mask.any()
    with pytest.raises(ValueError, match=r"waveform \(shape \[0\]\)"):
        clip_chunks(clip[:0])


def test_wrong_input_is_refused():
    encoder = tiny()
    with pytest.raises(ValueError, match=r"waveforms \(torch.int16 of shape \[1, 9\]\)"):
        encoder(torch.zeros(1, 9, dtype=torch.int16))
    with pytest.raises(ValueError, match=r"samples \(900\) must be enough for one patch"):
        encoder(torch.zeros(1, 900))
    with pytest.raises(ValueError, match=r"padding_mask \(shape \[1, 8\]\)"):
        encoder(torch.zeros(1, 9000), torch.zeros(1, 8, dtype=torch.bool))
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    clip = ClipImageEncoder(CLIPVisionConfig(image_size=28, patch_size=14, **sizes))
    with pytest.raises(ValueError, match=r"pixel_values \(shape \[3, 14, 14\]\)"):
        clip(torch.zeros(3, 14, 14))
    assert clip(torch.zeros(2, 8, 3, 28, 28)).shape == (2, 8, 4, 8)
