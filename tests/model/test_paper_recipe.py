"""configs/paper.yaml: its summary without any data, and all stages at tiny sizes."""

import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
import torch
import yaml
from recipe_case import write_case

from unimoe_model.cli import main
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.training.check import stage_config
from unimoe_model.training.recipe import START, load_recipe
from unimoe_model.training.starting_model import describe_start

PAPER = Path(__file__).parents[2] / "configs" / "paper.yaml"
TASKS = [f"task-{number}" for number in range(1, 9)]


def test_check_lists_the_paper_and_what_is_missing(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Of the stage that has experts alone, memory is forecast; all stages are listed.
    code, shown, error = run("train", PAPER, "--check", "--stage", "tune")
    assert (code, error) == (0, "")
    assert re.search(r"stage tune: [\d.]+ GiB: weights", shown)
    stages = re.findall(r"stage ([\w-]+): from ([\w-]+)", shown)
    assert [name for name, _ in stages] == [
        "align-image", "align-speech", "align-audio", *TASKS, "tune"
    ]  # fmt: skip
    assert dict(stages)["task-8"] == "align-audio"
    trained = dict(re.findall(r"stage ([\w-]+): .* trains ([\d,]+) of", shown))
    # Two linear maps with biases, 1024 -> 4096 -> 4096.
    assert trained["align-image"] == f"{1024 * 4096 + 4096 + 4096 * 4096 + 4096:,}"
    # 32 FFNs of three matrices, LoRA of rank 64 on each.
    lora = 32 * 3 * 64 * (4096 + 11008)
    assert trained["task-7"] == f"{lora + 768 * 4096 + 4096:,}"
    missing = re.findall(r"missing: (\S+) ", shown)
    assert "model.llm" in missing
    assert {name for name in missing if name.startswith("data.")} >= {"data.race.file"}
    assert not list(tmp_path.iterdir())


def test_parameters_are_those_of_table_1():
    """Four experts in every second layer: 13.2 B parameters, routers and connectors left out."""
    recipe = load_recipe(PAPER)
    configs = {START: describe_start(recipe, [], []).config}
    for stage in recipe.stages:
        configs[stage.name] = stage_config(stage, configs)
    with torch.device("meta"):
        model = UniMoEForConditionalGeneration(configs["tune"])

    def count(module):
        return sum(p.numel() for p in module.parameters())

    routers = sum(count(moe.router) for _, moe in model.moe_layers())
    total = count(model.model.language_model) + count(model.lm_head) - routers
    unused = sum(count(moe.experts) // 4 * 2 for _, moe in model.moe_layers())
    assert (total - unused, total) == (8_902_676_480, 13_231_198_208)
    millions = {
        kind: round(count(model.model.connector(kind)) / 1e6, 2)
        for kind in ("image", "speech", "audio")
    }
    # The published 156.77 M hold a token embedding of 51865 x 768 that is never used.
    unused_embedding = (51865 - 1) * 768 / 1e6
    assert millions == {
        "image": 20.98,
        "speech": round(156.77 - unused_embedding, 2),
        "audio": 102.43,
    }


@pytest.fixture
def tiny(tmp_path):
    """The paper's recipe with two steps a stage, tiny models, and data of all kinds."""
    case = write_case(tmp_path / "case")
    own, raw = yaml.safe_load(case.read_text()), yaml.safe_load(PAPER.read_text())
    raw |= {key: own[key] for key in ("model", "encoders", "connectors", "precision")}
    files = {"image": "pictures.json", "speech": "words.jsonl", "audio": "tones.jsonl"}
    files["both"] = "both.jsonl"
    words = map(json.loads, case.with_name("words.jsonl").read_text().splitlines())
    both = (json.dumps(line | {"image": f"media/{line['id']}.png"}) for line in words)
    case.with_name("both.jsonl").write_text("\n".join(both))
    kinds = {"llava-captions": "image", "image-text": "image", "image-speech": "both"}
    kinds |= dict.fromkeys(("common-voice", "race", "race-choice", "librispeech"), "speech")
    raw["data"] = {name: files[kinds.get(name, "audio")] for name in raw["data"]}
    shutil.copytree(tmp_path / "case" / "media", tmp_path / "case", dirs_exist_ok=True)
    for stage in raw["stages"]:
        del stage["epochs"], stage["max_length"]
        stage |= {"steps": 2, "batch_size": 4, "learning_rate": 1e-3}
        for how in stage["train"].values() if isinstance(stage["train"], dict) else ():
            if how != "whole":
                how["lora"] = 2
    path = tmp_path / "case" / "paper.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def test_every_stage_of_the_paper_trains_at_tiny_sizes(tiny, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(["train", str(tiny), "--output", str(output)]) == 0
    assert f"model in {output / 'model'}" in capsys.readouterr().out
    assert len(list(output.glob("stages/*/model/config.json"))) == 12
    config = (output / "model" / "config.json").read_text()
    assert '"moe_layers": "even"' in config
    assert re.sub(r"\s+", "", config).count('["model","task-2","task-3","task-7"]') == 1
