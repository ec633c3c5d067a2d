"""Folders of model and processor, by their own classes and by transformers' Auto classes."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from unimoe_model.auto import register_auto_classes
from unimoe_model.configuration import UniMoEConfig
from unimoe_model.generation import Answerer
from unimoe_model.modeling import UniMoEForConditionalGeneration, UniMoEModel
from unimoe_model.processing import UniMoEProcessor


@pytest.fixture
def saved(tiny_model, tokenizer, tmp_path):
    model = tiny_model(text_config={"tie_word_embeddings": True}, tie_word_embeddings=True)
    processor = UniMoEProcessor.from_config(model.config, tokenizer)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return SimpleNamespace(folder=tmp_path, model=model, processor=processor)


def same_weights(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_experts", [0, 4])
def test_loaded_model_is_the_saved_one_bit_for_bit(
    tiny_model, media_prompt, features, tmp_path, tied, num_experts
):
    model = tiny_model(
        num_experts=num_experts,
        text_config={"tie_word_embeddings": tied},
        tie_word_embeddings=tied,
    )
    model.save_pretrained(tmp_path)
    loaded, found = UniMoEForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert same_weights(model, loaded)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    inputs = {"input_ids": media_prompt("image"), "image_features": features("image")}
    assert torch.equal(model(**inputs).logits, loaded.eval()(**inputs).logits)
    assert loaded.generation_config.suppress_tokens == model.generation_config.suppress_tokens


@pytest.mark.parametrize("shards", ["50GB", "100KB"])
def test_the_umask_decides_who_may_read_a_checkpoint(tiny_model, tokenizer, tmp_path, shards):
    model = tiny_model()
    earlier = os.umask(0o027)
    try:
        model.save_pretrained(tmp_path, max_shard_size=shards)
        UniMoEProcessor.from_config(model.config, tokenizer).save_pretrained(tmp_path)
    finally:
        os.umask(earlier)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert set(modes.values()) == {0o640}, modes
    assert (sum(name.endswith(".safetensors") for name in modes) > 1) == (shards == "100KB")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_correction_biases_are_loaded_in_float32(tiny_model, tmp_path, dtype):
    model = tiny_model(moe_options={"mode": "sigmoid_renorm", "correction_bias": True})
    biases = {n: b for n, b in model.named_buffers() if n.endswith("correction_bias")}
    assert biases
    for bias in biases.values():
        bias.uniform_()
    model.save_pretrained(tmp_path)
    loaded = UniMoEForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    for name, bias in biases.items():
        assert torch.equal(loaded.get_buffer(name), bias)
        assert loaded.get_buffer(name).dtype == torch.float32


def test_auto_classes_load_a_folder(saved):
    register_auto_classes()
    register_auto_classes()
    assert type(AutoConfig.from_pretrained(saved.folder)) is UniMoEConfig
    for auto in (AutoModelForCausalLM, AutoModelForMultimodalLM):
        model = auto.from_pretrained(saved.folder)
        assert type(model) is UniMoEForConditionalGeneration
        assert same_weights(model, saved.model)
    base = AutoModel.from_pretrained(saved.folder)
    assert type(base) is UniMoEModel
    assert same_weights(base, saved.model.model)
    assert type(AutoProcessor.from_pretrained(saved.folder)) is UniMoEProcessor


def test_loaded_processor_has_all_fields(tiny_config, tokenizer, tmp_path):
    config = tiny_config(video_num_frames=5, speech_max_frames=77, vision_num_tokens=11)
    processor = UniMoEProcessor.from_config(config, tokenizer)
    processor.save_pretrained(tmp_path)
    loaded = UniMoEProcessor.from_pretrained(tmp_path)
    fields = {k: v for k, v in vars(processor).items() if k != "tokenizer"}
    assert {k: v for k, v in vars(loaded).items() if k != "tokenizer"} == fields
    assert loaded.video_num_frames == 5
    assert loaded.speech_max_frames == 77
    assert loaded.num_soft_tokens == {"image": 11, "video": 11, "speech": 4, "audio": 2}
    assert (loaded.vision_encoder, loaded.audio_encoder) == ("fake-vision", "fake-audio")
    text = "USER: <image>what is it? ASSISTANT:"
    assert loaded.tokenizer.encode(text) == tokenizer.encode(text)
    assert loaded.tokenizer.special_tokens_map == tokenizer.special_tokens_map


def test_answerer_answers_from_a_folder(saved):
    answerer = Answerer.from_pretrained(saved.folder)
    asked = Answerer(saved.model, saved.processor)
    answer = answerer.answer("what shape is it?", max_new_tokens=4)
    assert answer == asked.answer("what shape is it?", max_new_tokens=4)
    assert answer


def torchrun(*arguments):
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("-m", "unimoe_model.cli", "generate", *map(str, arguments)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def test_processes_that_share_the_experts_answer_like_one(saved):
    question = "what shape is it?"
    ended = torchrun("--model", saved.folder, question)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == Answerer(saved.model, saved.processor).answer(question).split()


@pytest.mark.slow
def test_processes_that_share_the_experts_all_end_on_an_error(saved):
    ended = torchrun("--model", saved.folder, "--image", saved.folder / "none.png", "what?")
    assert ended.returncode != 0
    assert "none.png" in ended.stderr


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def cut_config(folder):
    path = folder / "config.json"
    path.write_text(path.read_text()[:100])


def cut_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")


def drop(name):
    def remove(folder):
        (folder / name).unlink()

    return remove


def no_object(folder):
    (folder / "config.json").write_text("[]")


def drop_one_weight(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.image_connector.projector.0.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def change_config(**fields):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_weights, "cannot be read"),
        (cut_config, "cannot be read"),
        (cut_tokenizer, "cannot be read"),
        (drop("model.safetensors"), r"cannot be read: .*no file named model\.safetensors"),
        (drop_one_weight, r"image_connector\.projector\.0\.weight"),
        (change_config(num_experts=0), r"are of no use, such as .*layers\.0\.mlp\.experts"),
        (change_config(num_experts=8), r"are of another shape, such as .*layers\.0\.mlp\.experts"),
        (change_config(num_experts_per_tok=9), r"num_experts_per_tok \(9\)"),
        (change_config(num_experts="four"), "cannot be read: TypeError"),
        (change_config(model_type="llama"), r"model_type \('llama'\) in .* must be 'unimoe'"),
        (no_object, "config.json is no JSON object"),
        (drop("tokenizer.json"), r"must hold tokenizer\.json or tokenizer\.model"),
        (drop("processor_config.json"), r"must hold processor_config\.json"),
        (drop("tokenizer_config.json"), r"pad_token; there is none \(tokenizer_config\.json"),
    ],
)
def test_damaged_or_foreign_checkpoints_are_refused(saved, damage, message):
    damage(saved.folder)
    with pytest.raises(ValueError, match=message) as caught:
        Answerer.from_pretrained(saved.folder)
    assert str(saved.folder) in str(caught.value)


def test_processors_name_the_file_that_is_missing(saved):
    (saved.folder / "tokenizer.json").unlink()
    for loader in (UniMoEProcessor, AutoProcessor):
        register_auto_classes()
        with pytest.raises(ValueError, match=rf"\({saved.folder}\) must hold tokenizer\.json"):
            loader.from_pretrained(saved.folder)


def test_a_folder_without_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be a folder with a config\.json"):
        Answerer.from_pretrained(tmp_path)
