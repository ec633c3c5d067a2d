"""`unimoe train` from LLMs of other families than LLaMA, with their own chat templates."""

import json
import shutil
from unittest.mock import patch

import pytest

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
import yaml
from llms import CHATML, INST, THINKING, chat_tokenizer, llm
from recipe_case import write_case
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.training import starting_model
from unimoe_model.training.recipe import load_recipe


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return write_case(tmp_path_factory.mktemp("case") / "files")


@pytest.fixture
def with_llm(case, tmp_path):
    """The case with an LLM of a family; a function of the YAML mapping edits the recipe."""

    def build(family, template, edit=lambda raw: None, **options):
        folder = tmp_path / "files"
        shutil.copytree(case.parent, folder)
        tokenizer = chat_tokenizer(template, **options)
        llm(family, vocab_size=320).save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
        raw = yaml.safe_load(case.read_text())
        raw["model"] = family
        edit(raw)
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(raw, sort_keys=False))
        return path

    return build


def whole_run(path, run, output):
    code, shown, error = run("train", path, "--output", output)
    assert (code, error) == (0, "")
    model = output / "model"
    assert f"model in {model}" in shown
    picture = path.parent / "media" / "0.png"
    code, shown, error = run("generate", "what color is it?", "--model", model, "--image", picture)
    assert (code, error) == (0, "")
    return model, shown


def routing(run, model, path):
    data, output = path.parent / "held_out.jsonl", model.parent / "routing"
    return run("routing", "--model", model, "--data", data, "--output", output)


@pytest.mark.parametrize(
    ("family", "template", "options"),
    [
        ("qwen3", THINKING, {}),
        pytest.param("mistral", INST, {"bos_token": "<s>"}, marks=pytest.mark.slow),
        pytest.param("gemma3_text", CHATML, {"bos_token": "<s>"}, marks=pytest.mark.slow),
    ],
)
def test_stages_experts_and_evaluation(with_llm, run, tmp_path, family, template, options):
    def edit(raw):
        raw["stages"][0].update(train="all", steps=60)

    path = with_llm(family, template, edit, **options)
    code, shown, _ = run("train", path, "--output", tmp_path / "none", "--check")
    assert code == 0
    assert f"model: {family}, prompts in the tokenizer's chat template" in shown
    model, answer = whole_run(path, run, tmp_path / "run")
    config = json.loads((model / "config.json").read_text())
    assert config["text_config"]["model_type"] == family
    assert config["num_experts"] == 2
    processor = UniMoEProcessor.from_pretrained(model)
    assert processor.prompt_format == "chat"
    stops = config["text_config"]["eos_token_id"]
    assert (stops if isinstance(stops, list) else [stops]) == processor.stop_token_ids
    assert answer.strip() in ("red", "green", "blue")  # and stops there
    assert routing(run, model, path)[0] == 0


def test_an_llm_with_experts_keeps_them_and_trains_lora_on_them(with_llm, run, tmp_path):
    def edit(raw):
        align, *_, tune = raw["stages"]
        del tune["assemble"]
        tune["train"] = {"experts": {"lora": 2}, "router": "whole", "projectors": "whole"}
        raw["stages"] = [align, tune]

    path = with_llm("qwen3_moe", CHATML, edit)
    code, shown, _ = run("train", path, "--output", tmp_path / "none", "--check")
    assert code == 0
    assert "stage tune: " in shown
    model, _ = whole_run(path, run, tmp_path / "run")
    trained = UniMoEForConditionalGeneration.from_pretrained(model).model.language_model
    start = AutoModelForCausalLM.from_pretrained(path.parent / "qwen3_moe").model
    moved = {
        name for name, p in start.named_parameters() if not p.equal(trained.get_parameter(name))
    }
    assert moved == {
        f"layers.{layer}.mlp.{part}"
        for layer in (0, 1)
        for part in ("experts.gate_up_proj", "experts.down_proj", "gate.weight")
    }
    code, _, error = routing(run, model, path)
    assert code == 1
    assert "qwen3_moe" in error


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda raw: raw["stages"][1].update(train={"ffn": {"lora": 2}}),
            "stages.eyes: train (ffn) has no parameter in this model",
        ),
        (
            lambda raw: (
                raw["stages"].__delitem__(slice(1, 3))
                or raw["stages"][1].update(assemble={"experts": ["align", "align"]})
            ),
            "num_experts (2) must be 0: text_config (qwen3_moe) has experts of its own",
        ),
    ],
)
def test_what_an_llm_with_experts_cannot_do_is_refused(with_llm, run, tmp_path, edit, message):
    path = with_llm("qwen3_moe", CHATML, edit)
    code, _, error = run("train", path, "--output", tmp_path / "run")
    assert code == 1
    assert message in error
    assert not (tmp_path / "run").exists()


def test_an_llm_without_some_of_its_weights_is_refused(with_llm, run, tmp_path):
    path = with_llm("qwen3", CHATML)
    weights = path.parent / "qwen3" / "model.safetensors"
    held = load_file(weights)
    del held["model.layers.1.mlp.up_proj.weight"]
    save_file(held, weights, metadata={"format": "pt"})
    code, _, error = run("train", path, "--output", tmp_path / "run")
    assert code == 1
    assert "has missing keys: model.layers.1.mlp.up_proj.weight" in error


def test_another_familys_sentencepiece_model_is_left_to_its_own_tokenizer(with_llm, run, tmp_path):
    path = with_llm("gemma3_text", CHATML)
    folder = path.parent / "gemma3_text"
    (folder / "tokenizer.model").write_bytes(b"of Gemma")
    assert run("train", path, "--output", tmp_path / "run", "--check")[0] == 0
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "LlamaTokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    own = load_recipe(path)
    llama = patch.object(starting_model, "load_llama_tokenizer", side_effect=ValueError("llama"))
    with llama, pytest.raises(ValueError, match="llama"):
        starting_model.describe_start(own, [])
