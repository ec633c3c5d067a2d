import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[demo]")
from transformers import PreTrainedTokenizerFast

from unimoe_model import processing
from unimoe_model.encoders import FrozenEncoder
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.prompt import PLACEHOLDERS, build_prompt


class FakeVision(FrozenEncoder):
    """Three patches of 12 features that depend on the picture alone."""

    def __init__(self):
        super().__init__("fake", 12)

    def forward(self, pixels):
        mean = pixels.float().mean((1, 2, 3)) / 255
        return mean[:, None, None] * torch.arange(1.0, 37.0).reshape(1, 3, 12)


class FakeSpeech(FrozenEncoder):
    """One row for each of the clip's 10 samples."""

    sample_rate = 16000

    def __init__(self):
        super().__init__("fake", 16)

    def encode_clips(self, clips):
        lengths = torch.tensor([len(clip) // 10 for clip in clips])
        rows = torch.zeros(len(clips), int(lengths.max()), 16)
        for row, clip, length in zip(rows, clips, lengths, strict=True):
            row[:length] = float(clip.sum())
        return rows, lengths


class FakeAudio(FrozenEncoder):
    sample_rate = 44100

    def __init__(self):
        super().__init__("fake", 10)

    def forward(self, samples):
        return samples.sum(1)[:, None, None].expand(-1, 5, 10)


@pytest.fixture
def processor(tiny_config, tokenizer, monkeypatch):
    built = {"fake-vision": FakeVision(), "fake-speech": FakeSpeech(), "fake-audio": FakeAudio()}
    monkeypatch.setattr(processing, "_BUILT", built)
    return UniMoEProcessor.from_config(tiny_config(), tokenizer)


def picture(value, size=(20, 30)):
    return torch.full((*size, 3), value, dtype=torch.uint8)


def test_prompt_shows_media_then_question():
    assert build_prompt("what?", ["image", "speech"]) == (
        "USER: <image>\n<speech>\nwhat? ASSISTANT:"
    )
    assert build_prompt("  what? ") == "USER: what? ASSISTANT:"
    assert build_prompt("", ["speech"]) == "USER: <speech> ASSISTANT:"


def test_prompt_needs_something_to_ask():
    with pytest.raises(ValueError, match="question is empty"):
        build_prompt(" ")
    with pytest.raises(ValueError, match=r"media \(\['smell'\]\)"):
        build_prompt("what?", ["image", "smell"])


def test_placeholders_are_expanded_to_soft_tokens(processor, tokenizer):
    inputs = processor(
        "USER: <image>\n<speech>\n<audio>\n<video> ASSISTANT:",
        images=[picture(9)],
        videos=[picture(9).repeat(2, 1, 1, 1)],
        speech=[np.ones(30, np.float32)],
        audio=[np.ones(50, np.float32)],
    )
    ids = inputs["input_ids"][0]
    assert ids[0] == tokenizer.bos_token_id
    held = {
        k: int((ids == tokenizer.convert_tokens_to_ids(p)).sum()) for k, p in PLACEHOLDERS.items()
    }
    assert held == {"image": 3, "video": 3, "speech": 4, "audio": 2}
    shapes = {k: tuple(v.shape) for k, v in inputs.items() if k.endswith("_features")}
    assert shapes == {
        "image_features": (1, 3, 12),
        "video_features": (1, 2, 3, 12),
        "speech_features": (1, 6, 16),
        "audio_features": (1, 5, 10),
    }


def test_model_takes_what_the_processor_gives(processor, tiny_model):
    inputs = processor.ask(
        "what?",
        images=[picture(9)],
        speech=[np.ones(30, np.float32)],
        videos=[picture(9).repeat(2, 1, 1, 1)],
        audio=[np.ones(50, np.float32)],
    )
    logits = tiny_model()(**inputs).logits
    assert logits.shape[:2] == inputs["input_ids"].shape
    assert torch.isfinite(logits).all()


def test_rows_are_padded_on_the_left_and_media_kept_in_order(processor, tokenizer):
    prompts = [build_prompt("a?"), build_prompt("", ["image"]), build_prompt("b?", ["image"])]
    inputs = processor(prompts, images=[picture(10), picture(200)])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert (ids[mask == 0] == tokenizer.pad_token_id).all()
    assert (mask.diff(dim=1) >= 0).all()
    assert mask.sum(1).tolist() == [len(tokenizer.encode(processor._expand(p))) for p in prompts]
    first, second = inputs["image_features"].mean((1, 2))
    assert first < second


def test_frames_of_a_video_keep_their_order(processor):
    frames = torch.stack([picture(10), picture(200)])
    features = processor(build_prompt("", ["video"]), videos=[frames])["video_features"]
    assert features[0, 0].mean() < features[0, 1].mean()


def test_speech_is_padded_with_zeros(processor):
    clips = [np.ones(30, np.float32), np.ones(50, np.float32)]
    features = processor([build_prompt("", ["speech"])] * 2, speech=clips)["speech_features"]
    assert features.shape == (2, 6, 16)
    assert features[0, :3].eq(30).all()
    assert features[0, 3:].eq(0).all()
    assert features[1, :5].eq(50).all()


@pytest.mark.parametrize(
    ("prompt", "media", "message"),
    [
        ("<image>", {}, "text holds 1 <image> but 0 image items"),
        ("what?", {"images": [picture(1)]}, "text holds 0 <image> but 1 image items"),
        ("<speech><speech>", {"speech": [np.ones(9)]}, "text holds 2 <speech> but 1 speech"),
        ([], {}, "at least one prompt"),
        ("<image>", {"images": [picture(1).float()]}, r"images \(torch.float32.*must be uint8"),
        ("<image>", {"images": [picture(1)[..., :2]]}, r"shape \[20, 30, 2\]"),
        ("<video>", {"videos": [picture(1)]}, "4 dimensions"),
        ("<video>", {"videos": [picture(1).repeat(3, 1, 1, 1)]}, "hold 3 frames, expected 2"),
        ("<speech>", {"speech": [np.zeros(0)]}, r"speech clip \(shape \[0\]\)"),
        ("<audio>", {"audio": [np.ones((2, 9))]}, r"audio clip \(shape \[2, 9\]\)"),
        ("<audio>", {"audio": [np.array([1.0, np.nan])]}, "must be finite samples"),
        ("<speech>", {"speech": [np.ones(70)]}, r"\(7 rows.*speech_max_frames \(6\)"),
    ],
)
def test_bad_input_is_refused(processor, prompt, media, message):
    with pytest.raises(ValueError, match=message):
        processor(prompt, **media)


def test_sample_rates_are_the_encoders(processor):
    assert processor.sample_rate("speech") == 16000
    assert processor.sample_rate("audio") == 44100


def test_answers_are_decoded_without_prompt_and_special_tokens(processor, tokenizer):
    answer = tokenizer.encode(" a red circle")
    sequence = [1, 20, 30, *answer, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert processor.decode_answers(torch.tensor([sequence]), 3) == ["a red circle"]


def test_tokenizer_must_know_the_placeholders(tokenizer):
    soft = dict.fromkeys(PLACEHOLDERS, 3)
    plain = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer._tokenizer).from_str(
            tokenizer._tokenizer.to_str().replace("<speech>", "<spoken>")
        ),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
    with pytest.raises(ValueError, match="tokenizer has no token <speech>"):
        UniMoEProcessor(plain, num_soft_tokens=soft)
    with pytest.raises(ValueError, match=r"num_soft_tokens.*missing \['video', 'speech'"):
        UniMoEProcessor(tokenizer, num_soft_tokens={"image": 1})
