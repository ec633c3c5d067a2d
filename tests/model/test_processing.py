import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
import soundfile
from PIL import Image
from transformers import PreTrainedTokenizerFast

from unimoe_kernels.testing import relative_error
from unimoe_model.data.encoded_media import EncodedMedia
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.prompt import PLACEHOLDERS, build_prompt


@pytest.fixture
def processor(tiny_config, tokenizer, encoders):
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
    lengths = [
        len(tokenizer.encode(p.replace("<image>", "<image>" * 3), add_special_tokens=False)) + 1
        for p in prompts
    ]
    assert mask.sum(1).tolist() == lengths
    first, second = inputs["image_features"].mean((1, 2))
    assert first < second


def test_frames_of_a_video_keep_their_order(processor):
    frames = torch.stack([picture(10), picture(200)])
    features = processor(build_prompt("", ["video"]), videos=[frames])["video_features"]
    assert features[0, 0].mean() < features[0, 1].mean()


def test_speech_is_filled_up_with_zeros(processor):
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
        ("<video>", {"videos": [picture(1).repeat(0, 1, 1, 1)]}, "at least one frame"),
        ("<video>", {"videos": [[picture(1), picture(1, (9, 9))]]}, "must be of one size"),
        ("<speech>", {"speech": [np.zeros(0)]}, r"speech clip \(shape \[0\]\)"),
        ("<audio>", {"audio": [np.ones((2, 9))]}, r"audio clip \(shape \[2, 9\]\)"),
        ("<audio>", {"audio": [np.array([1.0, np.nan])]}, "must be finite samples"),
    ],
)
def test_bad_input_is_refused(processor, prompt, media, message):
    with pytest.raises(ValueError, match=message):
        processor(prompt, **media)


def tokens_of(ids, tokenizer, kind):
    return int((ids == tokenizer.convert_tokens_to_ids(PLACEHOLDERS[kind])).sum())


def test_media_in_any_order_and_number(processor, tokenizer):
    prompts = ["<audio> <image><audio> what? <image>", "<speech>\n<image> and <video>"]
    pictures = [picture(value) for value in (10, 60, 110)]
    sounds = [np.full(50, value, np.float32) for value in (1, 2)]
    inputs = processor(
        prompts,
        images=pictures,
        audio=sounds,
        speech=[np.ones(30, np.float32)],
        videos=[picture(7).repeat(2, 1, 1, 1)],
    )
    assert inputs["image_features"][:, 0, 0].mul(255).round().tolist() == [10, 60, 110]
    assert inputs["audio_features"][:, 0, 0].tolist() == [50, 100]
    first, second = inputs["input_ids"]
    assert [tokens_of(first, tokenizer, kind) for kind in PLACEHOLDERS] == [6, 0, 0, 4]
    assert [tokens_of(second, tokenizer, kind) for kind in PLACEHOLDERS] == [3, 3, 4, 0]
    names = [t for t in tokenizer.convert_ids_to_tokens(first.tolist()) if t[1:-1] in PLACEHOLDERS]
    assert names == ["<audio>"] * 2 + ["<image>"] * 3 + ["<audio>"] * 2 + ["<image>"] * 3


def test_long_recordings_become_several_pieces(processor, tokenizer, tiny_model):
    speech, sound = np.ones(130, np.float32), np.ones(120, np.float32)
    inputs = processor(["<speech><audio>", "<audio>"], speech=[speech], audio=[sound, sound[:20]])
    assert inputs["speech_features"].shape == (3, 6, 16)
    assert inputs["audio_features"].shape == (4, 5, 10)
    assert inputs["audio_features_mask"].sum(1).tolist() == [5, 5, 2, 2]
    first, second = inputs["input_ids"]
    assert tokens_of(first, tokenizer, "speech") == 3 * 4
    assert tokens_of(first, tokenizer, "audio") == 3 * 2
    assert tokens_of(second, tokenizer, "audio") == 2
    model = tiny_model().double()
    with torch.no_grad():
        together = model(**inputs).logits[1, -1]
        alone = model(**processor("<audio>", audio=[sound[:20]])).logits[0, -1]
    # Rotary angles are float32, at other positions rounded otherwise.
    assert relative_error(together, alone) < 1e-6


@pytest.mark.parametrize("most", range(1, 22))
def test_truncation_keeps_items_whole(processor, tokenizer, most):
    text = "a b c d<image>e<audio>f"
    media = {"images": [picture(5)], "audio": [np.ones(100, np.float32)]}
    whole = processor(text, **media)["input_ids"][0]
    inputs = processor(text, max_length=most, **media)
    ids = inputs["input_ids"][0]
    assert len(ids) <= most
    assert torch.equal(ids, whole[: len(ids)])
    image = whole.tolist().index(media_id(tokenizer, "image"))
    audio = whole.tolist().index(media_id(tokenizer, "audio"))
    assert tokens_of(ids, tokenizer, "image") == (3 if most >= image + 3 else 0)
    assert tokens_of(ids, tokenizer, "audio") == (4 if most >= audio + 4 else 0)
    assert ("image_features" in inputs) == (most >= image + 3)
    assert ("audio_features" in inputs) == (most >= audio + 4)


def media_id(tokenizer, kind):
    return tokenizer.convert_tokens_to_ids(PLACEHOLDERS[kind])


def test_truncation_of_one_row_leaves_the_media_of_others(processor):
    inputs = processor(
        ["a long question that comes first <image>", "<image>"],
        images=[picture(10), picture(200)],
        max_length=8,
    )
    assert inputs["image_features"][:, 0, 0].mul(255).round().tolist() == [200]


def test_answers_are_labelled_and_nothing_else(processor, tokenizer):
    inputs = processor.training_inputs(
        [[("<image>\nwhat shape?", "a red circle"), ("which word?", "yes")], [("a?", "no")]],
        images=[picture(9)],
    )
    labels, ids = inputs["labels"], inputs["input_ids"]
    for row, expected in enumerate((" a red circle</s> yes</s>", " no</s>")):
        learned = labels[row][labels[row] != -100]
        assert tokenizer.decode(learned) == expected
        assert torch.equal(ids[row][labels[row] != -100], learned)
    assert inputs["attention_mask"][1].tolist() == sorted(inputs["attention_mask"][1], reverse=True)


def test_padding_on_either_side_gives_the_same_loss_and_answers(processor, tiny_model):
    model = tiny_model().double()
    conversations = [
        [("<image>\nwhat shape?", "a red circle")],
        [("<speech>", "yes")],
        [("what?", "no")],
    ]
    media = {"images": [picture(90)], "speech": [np.ones(80, np.float32)]}
    batches = [
        processor.training_inputs(conversations, padding_side=side, **media)
        for side in ("left", "right")
    ]
    assert not torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    losses, gradients = [], []
    for batch in batches:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss)
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    # Rotary angles are float32, at other positions rounded otherwise.
    assert relative_error(*losses) < 1e-6
    for left, right in zip(*gradients, strict=True):
        assert relative_error(left, right) < 1e-5


def test_system_prompt_stands_first(tiny_config, tokenizer, encoders):
    processor = UniMoEProcessor.from_config(tiny_config(), tokenizer, system_prompt="which word?")
    ids = processor.ask("what?")["input_ids"][0]
    assert tokenizer.decode(ids) == "<s>which word? USER: what? ASSISTANT:"
    asked = processor.ask("what <image> is <image>", images=[picture(1), picture(2)])
    assert "what <image><image><image> is <image>" in tokenizer.decode(asked["input_ids"][0])


def test_pictures_are_padded_to_squares_where_asked(tiny_config, tokenizer, encoders):
    processor = UniMoEProcessor.from_config(tiny_config(), tokenizer, image_aspect_ratio="pad")
    assert processor("<image>", images=[picture(0)])["image_features"][0, 0, 0] == 1
    with pytest.raises(ValueError, match=r"image_aspect_ratio \('fill'\) must be one of"):
        UniMoEProcessor.from_config(tiny_config(), tokenizer, image_aspect_ratio="fill")


def test_files_and_arrays_are_the_same(processor, tmp_path):
    pixels = torch.randint(0, 256, (20, 30, 3), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    image.save(tmp_path / "a.png")
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), image, pixels.numpy()):
        features = processor("<image>", images=[given])["image_features"]
        assert torch.equal(features, processor("<image>", images=[pixels])["image_features"])
    samples = np.linspace(-0.2, 0.9, 60, dtype=np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16000)
    read = processor("<speech>", speech=[tmp_path / "a.wav"])["speech_features"]
    plain = processor("<speech>", speech=[samples])["speech_features"]
    assert relative_error(read, plain) < 1e-3
    slow = processor("<speech>", speech=[(np.ones(30, np.float32), 8000)])["speech_features"]
    assert slow[0].any(1).sum() == 6
    frames = [picture(value) for value in (0, 100, 200)]
    by_list = processor("<video>", videos=[frames])["video_features"]
    by_tensor = processor("<video>", videos=[torch.stack(frames)])["video_features"]
    assert torch.equal(by_list, by_tensor)
    assert by_list[0, :, 0, 0].mul(255).round().tolist() == [0, 100]


def test_pixels_may_be_read_only(processor):
    """As `np.asarray` of a Pillow image is."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = np.full((20, 30, 3), 7, dtype=np.uint8)
        expected = processor("<image>", images=[pixels])["image_features"]
        pixels.flags.writeable = False
        assert torch.equal(processor("<image>", images=[pixels])["image_features"], expected)
        assert expected.any()


def test_frames_may_be_drawn_with_a_seed(processor):
    frames = torch.arange(0, 250, 5, dtype=torch.uint8)[:, None, None, None].expand(-1, 4, 4, 3)
    drawn = {
        tuple(
            processor("<video>", videos=[frames], frame_seed=seed)["video_features"][0, :, 0, 0]
            .mul(255)
            .round()
            .tolist()
        )
        for seed in (0, 0, 1, 2, 3)
    }
    assert len(drawn) == 4
    assert all(first < second for first, second in drawn)


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


def test_features_that_were_computed_before_give_the_same_inputs(processor):
    media = {
        "images": [picture(9), picture(70)],
        "videos": [picture(9).repeat(2, 1, 1, 1)],
        "speech": [np.ones(90, np.float32)],  # two pieces
        "audio": [np.ones(50, np.float32), np.ones(20, np.float32)],
    }
    turns = [[("<image><video>what?<speech>", "yes")], [("<audio>a?<image> <audio>", "no")]]
    expected = processor.training_inputs(turns, **media)
    kinds = {"images": "image", "videos": "video", "speech": "speech", "audio": "audio"}
    encoded = {name: [processor.encode(kinds[name], i) for i in media[name]] for name in media}
    found = processor.training_inputs(turns, **encoded)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    asked = processor.ask("what?", images=media["images"][:1], speech=media["speech"])
    again = processor.ask("what?", images=encoded["images"][:1], speech=encoded["speech"])
    assert all(torch.equal(asked[name], again[name]) for name in asked)


def test_query_states_go_under_their_own_name_and_mix_with_no_features(processor):
    states = EncodedMedia((torch.ones(4, 16), torch.zeros(4, 16)), query_states=True)
    inputs = processor.training_inputs([[("<speech>", "yes")]], speech=[states])
    assert inputs["speech_query_states"].shape == (2, 4, 16)
    assert "speech_features" not in inputs
    assert (
        int((inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<speech>")).sum())
        == 8
    )
    mixed = [states, np.ones(30, np.float32)]
    with pytest.raises(ValueError, match="speech items of a batch must all be features or all"):
        processor.training_inputs([[("<speech><speech>", "yes")]], speech=mixed)


def test_media_of_unknown_names_are_refused(processor):
    with pytest.raises(TypeError, match=r"media \(\['image'\]\) must be among images, videos"):
        processor.ask("what?", image=[picture(9)])
