"""Errors of `unimoe convert`: they name the cause, and nothing is written."""

import json
import struct

import pytest
from published_checkpoints import (
    INNER,
    VOCAB,
    WIDTH,
    adapter,
    ffn,
    matrix,
    published,
    write,
)
from safetensors.torch import load_file, save_file

from unimoe_model.checkpoints.convert import convert_from_published, convert_to_published
from unimoe_model.checkpoints.record import Conversion

pytestmark = pytest.mark.usefixtures("shallow_connectors")

GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"


def without(state, name):
    del state[name]


def misshapen(state, name, shape):
    state[name] = matrix(*shape)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: without(s, GATE), f"{GATE} is missing"),
        (lambda s: without(s, "model.embed_tokens.weight"), "model.embed_tokens.weight is missing"),
        (lambda s: without(s, "model.norm.weight"), "nothing for model.language_model.norm.weight"),
        (
            lambda s: without(s, "model.mm_projector.2.bias"),
            "nothing for model.image_connector.projector.2.bias",
        ),
        (
            lambda s: [s.pop(n) for n in list(s) if ".experts.3." in n],
            r"model.layers.\d.mlp.experts.3.(gate|up|down)_proj.weight is missing",
        ),
        (lambda s: misshapen(s, "model.layers.9.mlp.fc", (3,)), "model.layers.9.mlp.fc is no"),
        (
            lambda s: s.update(ffn("model.layers.0.mlp.experts.4.")),
            r"experts.4.(gate|down)_proj.weight is not an expert below num_experts",
        ),
        (
            lambda s: misshapen(s, "model.layers.7.input_layernorm.weight", (WIDTH,)),
            "model.layers.7.input_layernorm.weight becomes .*, which the model does not have",
        ),
        (lambda s: misshapen(s, GATE, (INNER, WIDTH + 1)), f"{GATE} .* must have the shape and"),
        (
            lambda s: misshapen(s, "lm_head.weight", (VOCAB, WIDTH - 1)),
            r"lm_head.weight gives lm_head.weight the shape \[300, 31\], expected \[300, 32\]",
        ),
        (
            lambda s: s.update({GATE: s[GATE].float()}),
            rf"{GATE} \(.*float32\) must have the .* dtype of .*gate_proj.weight \(.*bfloat16\)",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_written(tmp_path, tokenizer_folder, change, named):
    state, config = published("every layer, speech")
    change(state)
    source = write(tmp_path / "source", state, config)
    with pytest.raises(ValueError, match=named):
        convert_from_published(source, tmp_path / "ours", tokenizer=tokenizer_folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("pickled", [False, True])
def test_cut_files_are_named(tmp_path, tokenizer_folder, pickled):
    state, config = published("every layer, speech")
    source = write(tmp_path / "source", state, config, pickled=pickled)
    path = sorted(source.glob("*00002-of*"))[0]
    whole = path.read_bytes()
    for length in (len(whole) * 2 // 3, 4, 0):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{path.name} is truncated or damaged: \w+"):
            convert_from_published(source, tmp_path / "ours", tokenizer=tokenizer_folder)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path.name} is missing"):
        convert_from_published(source, tmp_path / "ours", tokenizer=tokenizer_folder)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "field",
    ["hidden_size", "vocab_size", "num_experts", "num_experts_per_tok", "query_tokens_size"],
)
def test_fields_that_the_configuration_lacks(tmp_path, tokenizer_folder, field):
    state, config = published("every layer, speech")
    del config[field]
    source = write(tmp_path / "source", state, config)
    with pytest.raises(ValueError, match=f"config.json must have {field}"):
        convert_from_published(source, tmp_path / "ours", tokenizer=tokenizer_folder)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"speach_connector": {}}, r"field speach_connector \(set to {}\) must be one of UniMoE"),
        ({"num_experts": "abc"}, r"field num_experts \(set to 'abc'\) must be of type int"),
        ({"text_config": 3}, r"field text_config \(set to 3\) must be of type dict"),
    ],
)
def test_overrides_that_are_none(tmp_path, tokenizer_folder, override, message):
    source = write(tmp_path / "source", *published("every layer, speech"))
    with pytest.raises(ValueError, match=message):
        convert_from_published(
            source, tmp_path / "ours", tokenizer=tokenizer_folder, overrides=override
        )
    assert not (tmp_path / "ours").exists()


def test_a_model_that_was_converted_already(tmp_path, tokenizer_folder):
    state, config = published("every layer, speech")
    source = write(tmp_path / "source", state, config | {"model_type": "unimoe"})
    with pytest.raises(ValueError, match=r"source\) must hold a published checkpoint; it is a uni"):
        convert_from_published(source, tmp_path / "ours", tokenizer=tokenizer_folder)


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"a": 1}', '{"a": {"dtype": "F99"}}'])
def test_headers_that_are_none(tmp_path, tokenizer_folder, content):
    folder = tmp_path / "source"
    folder.mkdir()
    header = content.encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"....")
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or damaged: \w+"):
        convert_from_published(folder, tmp_path / "ours", tokenizer=tokenizer_folder)


def test_a_write_that_fails_leaves_nothing(tmp_path, tokenizer_folder, monkeypatch):
    state, config = published("every layer, speech")
    source = write(tmp_path / "source", state, config)

    def full(self, folder):
        raise OSError("No space left on device")

    monkeypatch.setattr(Conversion, "save", full)
    with pytest.raises(OSError, match="No space"):
        convert_from_published(source, tmp_path / "ours", tokenizer=tokenizer_folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_rslora", True),
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 8}),
    ],
)
def test_adapters_of_another_kind(tmp_path, tokenizer_folder, option, value):
    state, config = published("every layer, speech")
    base = write(tmp_path / "base", state, config)
    folder, *_ = adapter(tmp_path / "adapter", state)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {option: value}))
    with pytest.raises(ValueError, match=f"config.json must be of a plain LoRA, has {option}"):
        convert_from_published(folder, tmp_path / "ours", base, tokenizer_folder)
    assert not (tmp_path / "ours").exists()


def test_adapters_that_do_not_fit(tmp_path, tokenizer_folder):
    state, config = published("every layer, speech")
    base = write(tmp_path / "base", state, config)
    folder, loras, *_ = adapter(tmp_path / "adapter", state)
    path = folder / "adapter_model.safetensors"
    half = next(name for name in loras if "q_proj.lora_B" in name)

    def refused(state, message):
        save_file(state, path)
        with pytest.raises(ValueError, match=message):
            convert_from_published(folder, tmp_path / "ours", base, tokenizer_folder)

    left = {name: value for name, value in loras.items() if name != half}
    refused(left, f"{path.name}: LoRA of .*q_proj must have A and B, has A")
    refused(loras | {"x.lora_C.weight": matrix(2)}, "x.lora_C.weight is neither A nor B of a LoRA")
    refused(loras | {half: matrix(WIDTH, 3)}, r"q_proj.lora_B.weight \(shape \[32, 3\].* must fit")
    # The expert beside the one with LoRA.
    beside = "model.layers.0.mlp.experts.2.down_proj.weight"
    base = write(tmp_path / "mixed", state | {beside: state[beside].float()}, config)
    refused(loras, rf"{beside} \(.*float32\) must have the shape and dtype of")
    assert not (tmp_path / "ours").exists()


def test_arguments_that_do_not_go_together(tmp_path, tokenizer_folder):
    state, config = published("every layer, speech")
    source = write(tmp_path / "source", state, config)
    folder, *_ = adapter(tmp_path / "adapter", state)
    target = tmp_path / "ours"
    with pytest.raises(ValueError, match="which requires its base"):
        convert_from_published(folder, target, tokenizer=tokenizer_folder)
    with pytest.raises(ValueError, match=r"is not supported: .* holds no adapter"):
        convert_from_published(source, target, source, tokenizer_folder)
    with pytest.raises(ValueError, match="must hold a tokenizer"):
        convert_from_published(source, target)
    with pytest.raises(ValueError, match="must have been written by unimoe convert"):
        convert_to_published(source, target)
    with pytest.raises(ValueError, match="must hold weights: one of"):
        convert_from_published(tokenizer_folder, target)
    with pytest.raises(ValueError, match="already exists"):
        convert_from_published(source, tmp_path / "adapter", tokenizer=tokenizer_folder)
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": VOCAB + 1}))
    with pytest.raises(ValueError, match=r"expected \[301, 32\]"):
        convert_from_published(source, target, tokenizer=tokenizer_folder)
    assert not target.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "lm_head.weight"), "lm_head.weight is missing"),
        (
            lambda s: misshapen(s, "a.weight", (3,)),
            "a.weight becomes a.weight, which the model does not have",
        ),
        (
            lambda s: misshapen(s, "lm_head.weight", (VOCAB, WIDTH - 1)),
            r"lm_head.weight the shape \[300, 31\], expected \[300, 32\]",
        ),
    ],
)
def test_models_that_cannot_go_back(tmp_path, tokenizer_folder, change, message):
    source = write(tmp_path / "source", *published("every layer, speech"))
    convert_from_published(source, tmp_path / "ours", tokenizer=tokenizer_folder)
    path = tmp_path / "ours" / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)
    with pytest.raises(ValueError, match=message):
        convert_to_published(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()
