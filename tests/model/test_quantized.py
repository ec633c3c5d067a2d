"""A Uni-MoE with quantised experts: saved, loaded, asked, and trained with LoRA."""

import copy
import re
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from unimoe_kernels import (
    QuantizedExperts,
    dequantize_weight,
    load_quantized,
    quantize_experts,
)
from unimoe_model.auto import register_auto_classes
from unimoe_model.calibration_data import calibration_inputs
from unimoe_model.configuration import UniMoEConfig
from unimoe_model.generation import Answerer
from unimoe_model.processing import UniMoEProcessor

FORMATS = {"int8": ("int8", None), "int4": ("int4", 32)}


@pytest.fixture(params=FORMATS.values(), ids=FORMATS)
def quantized(request, tiny_model):
    return quantize_experts(tiny_model(text_config={"intermediate_size": 64}), *request.param)


def test_it_computes_what_its_dequantized_weights_give(
    quantized, tiny_model, media_prompt, features
):
    exact = tiny_model(text_config={"intermediate_size": 64})
    with torch.no_grad():
        for name, experts in quantized.named_modules():
            if isinstance(experts, QuantizedExperts):
                for key in ("gate_up_proj", "down_proj"):
                    weight = dequantize_weight(getattr(experts, key).weight)
                    exact.get_parameter(f"{name}.{key}").copy_(weight)
    inputs = {"input_ids": media_prompt("image"), "image_features": features("image")}
    expected = exact(**inputs).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(quantized(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_folder_comes_back_and_answers(quantized, tokenizer, encoders, tmp_path):
    quantized.save_pretrained(tmp_path)
    UniMoEProcessor.from_config(quantized.config, tokenizer).save_pretrained(tmp_path)
    register_auto_classes()
    loaded = load_quantized(tmp_path)
    state = quantized.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    answerer = Answerer.from_pretrained(tmp_path)
    assert any(isinstance(part, QuantizedExperts) for part in answerer.model.modules())
    expected = Answerer(quantized, answerer.processor).answer("what shape is it?")
    assert answerer.answer("what shape is it?") == expected
    with pytest.raises(ValueError, match="quantised experts, which are not supported with several"):
        Answerer.from_pretrained(tmp_path, mesh=object())
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    broken = next(name for name in state if name.endswith("gate_up_proj.scales"))
    state.pop(broken)
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"(?s)cannot be read.*{broken}"):
        Answerer.from_pretrained(tmp_path)
    shutil.rmtree(tmp_path)


def test_lora_trains_and_the_rest_of_the_experts_does_not(quantized, media_prompt):
    before = copy.deepcopy(quantized.state_dict())
    for part in quantized.modules():
        if isinstance(part, QuantizedExperts):
            part.add_lora(2)
    ids = media_prompt()
    optimizer = torch.optim.SGD([p for p in quantized.parameters() if p.requires_grad], 0.1)
    losses = []
    for _ in range(3):
        loss = quantized(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    after = quantized.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if k.endswith("values"))
    assert any(after[name].any() for name in after if name.endswith("lora_B"))


def test_the_command_writes_a_folder_that_answers(checkpoint, run, tmp_path, encoders):
    source = checkpoint(text_config={"intermediate_size": 64})
    target = tmp_path / "int8"
    code, out, _ = run("quantize", "--model", source, "--to", target, "--format", "int8")
    assert code == 0
    assert "MB of weights became" in out
    names = {path.name for path in source.iterdir()}
    assert {path.name for path in target.iterdir()} == names
    answerer = Answerer.from_pretrained(target)
    assert any(isinstance(part, QuantizedExperts) for part in answerer.model.modules())
    assert (target / "model.safetensors").stat().st_size < (
        source / "model.safetensors"
    ).stat().st_size
    assert isinstance(answerer.answer("what shape is it?"), str)
    for arguments, message in [
        (("--model", source, "--to", target), r"int8\) already exists"),
        (("--model", target, "--to", tmp_path / "b"), "is quantised already"),
        (("--model", tmp_path / "c", "--to", tmp_path / "b"), "must be a folder with a config"),
        (
            ("--model", source, "--to", tmp_path / "b", "--group-size", "128"),
            r"rows of \d+ numbers, which must be a multiple of group_size \(128\)",
        ),
    ]:
        code, _, line = run("quantize", *arguments)
        assert code == 1
        assert re.search(message, line), line
        assert not (tmp_path / "b").exists()


def test_calibration_keeps_media_that_are_longer_than_a_text(checkpoint, data, lines, monkeypatch):
    monkeypatch.setattr("unimoe_model.calibration_data.ROW_TOKENS", 3)
    model = checkpoint(text_config={"intermediate_size": 64})
    (row, *_) = calibration_inputs(model, data(lines[:1]))
    assert row["image_features"].shape[0] == 1
    config = UniMoEConfig.from_pretrained(model)
    soft = row["input_ids"] == config.media_token_ids["image"]
    assert soft.sum() == config.num_soft_tokens("image")
    assert row["input_ids"].shape[1] > soft.sum() + 8


def test_the_command_calibrates(checkpoint, run, data, lines, tmp_path):
    source = checkpoint(text_config={"intermediate_size": 64})
    texts = [{"text": "what shape is it? a red circle, yes no yes"}] * 20
    talks = [{"question": "what shape is it?", "answer": "a red circle"}, *lines[:2]]
    values = {}
    options = ("--model", source, "--format", "int4", "--group-size", 32)
    for name, calibration in {
        "plain": (),
        "texts": ("--calibrate", data(texts, "texts.jsonl")),
        "talks": ("--calibrate", data([{**line, "id": i} for i, line in enumerate(talks)])),
        "again": ("--calibrate", data(texts, "texts.jsonl")),
    }.items():
        target = tmp_path / name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code, _, line = run("quantize", *options, "--to", target, *calibration)
        assert code == 0, line
        values[name] = load_file(target / "model.safetensors")
    key = next(name for name in values["plain"] if name.endswith("down_proj.values"))
    assert torch.equal(values["texts"][key], values["again"][key])
    for one, other in (("plain", "texts"), ("plain", "talks"), ("texts", "talks")):
        assert values[one].keys() == values[other].keys()
        assert any(not torch.equal(values[one][k], values[other][k]) for k in values[one])
    for content, message in [
        ([], "must hold at least one conversation|at least one text"),
        ([texts[0], {"question": "a"}], "line 2 must be .*text.* as the lines before"),
        ([{"nothing": 1}], "nothing"),
    ]:
        code, _, line = run(
            "quantize",
            *options,
            "--to",
            tmp_path / "bad",
            "--calibrate",
            data(content, "bad.jsonl"),
        )
        assert code == 1
        assert re.search(message, line), line
        assert not (tmp_path / "bad").exists()
    code, _, line = run(
        "quantize", *options, "--to", tmp_path / "bad", "--calibrate", tmp_path / "gone.jsonl"
    )
    assert code == 1
    assert "gone.jsonl) must be a file of JSON lines; there is no such file" in line
