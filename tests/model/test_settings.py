import json
from pathlib import Path

import pytest
import torch
import yaml

from unimoe_model.data.limits import DataLimits
from unimoe_model.training.settings import load_settings

_FOLDER = Path(__file__).resolve().parents[2] / "configs"
CONFIGS = [_FOLDER / "demo.yaml", _FOLDER / "tiny.yaml"]


def stage(**tasks):
    return {"steps": 2, "batch_size": 2, "learning_rate": 0.01, "tasks": tasks}


def raw_settings():
    return {
        "seed": 0,
        "precision": "fp32",
        "model": {
            "text": {"hidden_size": 32, "num_attention_heads": 2},
            "vocab_size": 300,
            "top_k": 2,
            "speech_max_frames": 6,
            "speech_num_queries": 4,
            "audio_num_queries": 2,
            "audio_connector": {"hidden_size": 16, "num_attention_heads": 2},
        },
        "pretrain": stage(text=1),
        "align": stage(picture=1),
        "experts": {"image": stage(image_qa=1), "audio": stage(sound=0.5)},
        "tune": stage(text=1, sound=2),
        "expert_lora_rank": 3,
        "expert_lora_alpha": 6,
        "lora_rank": 2,
        "lora_alpha": 4,
    }


@pytest.fixture
def load(tmp_path):
    def write_and_load(raw, **overrides):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(raw))
        return load_settings(path, **overrides)

    return write_and_load


def with_value(keys, value):
    """The settings with a value put under a path of keys, or taken away if it is None."""
    raw = inner = raw_settings()
    *outer, last = keys.split(".")
    for key in outer:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return raw


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_of_the_repository_are_valid(path):
    settings = load_settings(path)
    assert set(settings.experts) == {"image", "video", "speech", "audio"}


def test_settings_are_what_the_file_says(load):
    settings = load(raw_settings(), seed=5)
    assert settings.seed == 5
    assert settings.align.optimizer.learning_rate == 0.01
    assert settings.tune.tasks == {"text": 1, "sound": 2}
    assert settings.model.moe_layers == "all"
    assert settings.evaluation == {}


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ("speed", 1, r"config.yaml has unknown keys \['speed'\]; known are \['align'"),
        ("tune.step", 1, r"tune has unknown keys \['step'\]"),
        ("model.topk", 1, r"model has unknown keys \['topk'\]"),
        ("model.text.layers", 1, r"text has unknown keys \['layers'\], not of LlamaConfig"),
        ("model.audio_connector.a", 1, r"audio_connector has unknown keys \['a'\]"),
        ("seed", None, r"config.yaml lacks the keys \['seed'\]"),
        ("model", None, r"config.yaml lacks the keys \['model'\]"),
        ("model.vocab_size", None, r"model lacks the keys \['vocab_size'\]"),
        ("align.steps", None, r"align lacks the keys \['steps'\]"),
        ("align.tasks", None, r"align.tasks \(None\) must be a mapping of task to weight"),
        ("seed", "one", r"seed \('one'\) must be of type int"),
        ("seed", True, r"seed \(True\) must be of type int"),
        ("precision", 16, r"precision \(16\) must be of type str"),
        ("precision", "fp16", r"precision \('fp16'\) must be 'auto', 'bf16' or 'fp32'"),
        ("align.learning_rate", "1e-3", r"align.learning_rate \('1e-3'\) must be of type float"),
        ("align.learning_rate", 0, r"learning_rate \(0\) must be positive"),
        ("align.muon_learning_rate", "x", r"muon_learning_rate \('x'\) must be of type"),
        ("align.steps", 1.5, r"align.steps \(1.5\) must be of type int"),
        ("align.steps", 0, r"align: steps \(0\) must be at least 1"),
        ("align.tasks.picture", -1, r"align.tasks.picture \(-1\) must be a positive number"),
        ("align.tasks.picture", "a", r"align.tasks.picture \('a'\) must be a positive number"),
        ("align", [1], r"align \(\[1\]\) must be a mapping"),
        ("model", 3, r"model \(3\) must be a mapping"),
        ("model.text", 3, r"model.text \(3\) must be of type dict"),
        ("model.top_k", 3, r"model.top_k \(3\) must be .* at most the number of experts \(2\)"),
        ("experts", 3, r"experts \(3\) must be of type"),
        ("experts", {}, r"experts \(none\) must be among"),
        ("experts.smell", stage(text=1), r"experts \(\['smell'\]\) must be among"),
        ("experts.audio.steps", 3, r"experts must all have the same number of steps"),
        (
            "align.tasks.pictures",
            1,
            r"align.tasks has unknown keys \['pictures'\]; known are \['as",
        ),
        ("align.muon_learning_rate", -1, r"align: muon_learning_rate \(-1\) must be positive"),
        ("align.max_grad_norm", 0, r"align: max_grad_norm \(0\) must be positive"),
        ("align.weight_decay", -1, r"align: weight_decay \(-1\) must be at least 0"),
        ("align.warmup", 5, r"align: warmup \(5\) must be a share of the steps, 0 to 1"),
        ("model.text.hidden_size", 0, r"model: text.hidden_size \(0\) must be at least 1"),
        ("model.text.hidden_size", "a", r"text must be .* LlamaConfig: Field 'hidden_size' exp"),
        ("model.text.num_attention_heads", 3, r"text must be fields .* size \(32\) is not a mult"),
        ("model.text.hidden_act", "x", r"text.hidden_act \('x'\) must be an activation of trans"),
        (
            "model.audio_connector.num_attention_heads",
            3,
            r"audio_connector.hidden_size \(16\) must be a multiple of num_attention_heads \(3\)",
        ),
        ("model.vocab_size", 5, r"model: vocab_size \(5\) must be at least 265"),
        ("model.speech_max_frames", 0, r"speech_max_frames \(0\) must be at least 1"),
        ("model.speech_num_queries", 0, r"speech_num_queries \(0\) must be at least 1"),
        ("model.audio_num_queries", -1, r"audio_num_queries \(-1\) must be at least 1"),
        ("model.load_balancing_coef", -0.1, r"load_balancing_coef \(-0.1\) must be at least 0"),
        ("model.moe_layers", "odd", r"model: moe_layers \('odd'\) must be one of \('all', 'even'"),
        (
            "model.moe_layers",
            [0, 99],
            r"moe_layers \(\[0, 99\]\) .* below num_hidden_layers \(32\)",
        ),
        ("model.moe_layers", ["a"], r"model.moe_layers \(\['a'\]\) must be of type str | list"),
        ("seed", -1, r"config.yaml: seed \(-1\) must be at least 0"),
        ("router_strength", -1, r"router_strength \(-1\) must be at least 0"),
        ("lora_rank", 0, r"lora_rank \(0\) must be at least 1"),
        ("evaluation", {"txt": 3}, r"evaluation \(\['txt'\]\) must be among"),
        ("evaluation", {"text": 0}, r"evaluation.text \(0\) must be at least 1"),
        ("evaluation", {"text": "all"}, r"evaluation \({'text': 'all'}\) must be of type"),
    ],
)
def test_wrong_settings_are_refused(load, keys, value, message):
    with pytest.raises(ValueError, match=message):
        load(with_value(keys, value))


def test_layers_with_experts_may_be_listed(load):
    assert load(with_value("model.moe_layers", [0, 2])).model.moe_layers == [0, 2]


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"config \(.*config.yaml\) must be a readable YAML file"):
        load_settings(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "must be a readable YAML file"), ("a: [", "readable YAML"), ("- 1", "got list")],
)
def test_files_that_are_no_settings(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_settings(path)
    assert str(path) in str(caught.value)


def test_precision_given_is_kept_and_auto_decided(load):
    cpu = torch.device("cpu")
    assert load(raw_settings()).resolved_precision(cpu) == "fp32"
    assert load(raw_settings(), precision="auto").resolved_precision(cpu) in ("bf16", "fp32")


def test_exactly_one_of_pretrain_and_language_model(load):
    for changes in ({"language_model": "llm"}, {"pretrain": None, "language_model": None}):
        with pytest.raises(ValueError, match=r"exactly one of|model\.text must be left out"):
            load(raw_settings() | changes)


def test_sizes_come_from_the_language_model(load, tmp_path):
    raw = raw_settings() | {"language_model": "llm"}
    del raw["pretrain"]
    with pytest.raises(ValueError, match=r"model\.text must be left out"):
        load(raw)
    for name in ("text", "vocab_size"):
        del raw["model"][name]
    with pytest.raises(ValueError, match=r"language_model \(.*llm\) must be a LLaMA"):
        load(raw)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    (tmp_path / "llm").mkdir()
    written = json.dumps({"model_type": "llama", "vocab_size": 310, "dtype": "float16"} | sizes)
    (tmp_path / "llm" / "config.json").write_text(written)
    settings = load(raw)
    assert (settings.model.text, settings.model.vocab_size) == (sizes, 310)
    assert settings.language_model == str(tmp_path / "llm")
    with pytest.raises(ValueError, match=r"language_model .* cannot be read"):
        settings.result_facts()
    (tmp_path / "llm" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "llm" / "tokenizer.json").write_bytes(b"words")
    facts = settings.result_facts()
    assert str(tmp_path) not in str(facts)
    (tmp_path / "llm" / "model.safetensors").write_bytes(b"other weights")
    assert settings.result_facts() != facts


def test_limits_of_data_are_read(load):
    raw = raw_settings() | {"data": {"videos": 8}}
    assert load(raw).data == DataLimits(videos=8)
    with pytest.raises(ValueError, match=r"data has unknown keys \['films'\]"):
        load(raw_settings() | {"data": {"films": 8}})


@pytest.fixture
def tiny_yaml_with(tmp_path):
    """Reads the demo's settings with another line at their end."""

    def read(line):
        text = CONFIGS[0].with_name("tiny.yaml").read_text(encoding="utf-8")
        (tmp_path / "with.yaml").write_text(f"{text}\n{line}\n", encoding="utf-8")
        return load_settings(tmp_path / "with.yaml")

    return read


def test_parallel_sizes_are_read(tiny_yaml_with):
    settings = tiny_yaml_with("parallel: {data: 2, expert: 4}")
    assert (settings.parallel.data, settings.parallel.expert) == (2, 4)
    assert tiny_yaml_with("").parallel is None


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("parallel: {data: 0}", r"parallel: data \(0\) must be at least 1"),
        ("parallel: {expert: two}", r"parallel\.expert \('two'\) must be of type int"),
        ("parallel: {experts: 2}", r"parallel has unknown keys \['experts'\]"),
        ("parallel: {timeout: 0}", r"timeout \(0\) must be above 0"),
        (
            "parallel: {expert: 3}",
            r"parallel\.expert \(3\) must divide the number of experts \(4\)",
        ),
        ("parallel: 2", r"parallel.* \(2\) must be a mapping"),
    ],
)
def test_wrong_parallel_sizes_are_refused(tiny_yaml_with, text, error):
    with pytest.raises(ValueError, match=error):
        tiny_yaml_with(text)


def test_how_many_processes_decides_no_result(tiny_yaml_with):
    parallel = tiny_yaml_with("parallel: {data: 2, expert: 4}")
    assert parallel.result_facts() == tiny_yaml_with("").result_facts()
