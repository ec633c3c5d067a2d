"""Transformers' `Trainer` and `unimoe train` fine-tune the same model to the same weights."""

import json
import re
import shutil
import sys

import pytest

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
import torch
import yaml
from load_example import example
from recipe_case import write_case
from safetensors.torch import load_file

from unimoe_kernels.testing import relative_error
from unimoe_model.cli import main as unimoe
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.training.starting_model import load_whole

STEPS = 10
# None is a default of recipe or example. Gradients of several steps are cut at this norm.
SETTINGS = {
    "steps": STEPS,
    "batch_size": 6,
    "learning_rate": 0.02,
    "schedule": "linear",
    "final_rate": 0.2,
    "warmup": 0.3,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "accumulation": 2,
}
LORA = {"lora": 3, "alpha": 12}
STAGES = {
    "base": {
        "assemble": {
            "experts": ["model"] * 3,
            "top_k": 2,
            "options": {"load_balancing_coef": 0.3},
        },
        "train": ["connectors", "experts", "router"],
        "steps": 4,
        "batch_size": 6,
        "learning_rate": 0.01,
    },
    "lora": {"train": {"attention": LORA, "experts": LORA}, **SETTINGS},
}


def in_dtype(monkeypatch, dtype, *modules):
    for module in ("unimoe_model.training.starting_model", *modules):
        target = sys.modules[module] if isinstance(module, str) else module
        monkeypatch.setattr(target, "load_whole", lambda folder: load_whole(folder).to(dtype))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A folder with data of all kinds in one file, recipes, and a Uni-MoE with three experts."""
    folder = write_case(tmp_path_factory.mktemp("case") / "files").parent
    lines = (folder / "words.jsonl").read_text() + (folder / "tones.jsonl").read_text()
    for item in json.loads((folder / "pictures.json").read_text()):
        lines += json.dumps(item | {"image": f"media/{item['image']}"}) + "\n"
    (folder / "mixed.jsonl").write_text(lines)
    (folder / "encoders.yaml").write_text("audio: ears:Ears\n")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    del recipe["evaluate"]
    for name, stage in STAGES.items():
        recipe |= {"data": {"mixed": "mixed.jsonl"}}
        recipe["stages"] = [{"name": name, "data": ["mixed"], **stage}]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        recipe |= {"model": str(folder / "base" / "model")}
        recipe.pop("connectors", None)
    assert unimoe(["train", str(folder / "base.yaml"), "--output", str(folder / "base")]) == 0
    return folder


@pytest.fixture
def by_recipe(case, tmp_path, monkeypatch):
    """Trains by recipe in a dtype; gives losses and weights."""

    def train(dtype):
        in_dtype(monkeypatch, dtype)
        output = tmp_path / "recipe"
        assert unimoe(["train", str(case / "lora.yaml"), "--output", str(output)]) == 0
        (metrics,) = output.glob("stages/lora-*/metrics.json")
        losses = json.loads(metrics.read_text())["losses"]
        return losses, load_file(output / "model" / "model.safetensors")

    return train


@pytest.fixture
def by_trainer(case, tmp_path, monkeypatch):
    """Trains by the example; gives losses, weights and the log, of all steps."""
    monkeypatch.setattr("unimoe_model.encoders.outside._CHOSEN", {})
    module = example("hf_trainer")

    def train(*options, dtype=torch.float32, output=tmp_path / "trainer", **changes):
        in_dtype(monkeypatch, dtype, module)
        given = {
            "model": case / "base" / "model",
            "data": case / "mixed.jsonl",
            "encoders": case / "encoders.yaml",
            "output": output,
            "rank": LORA["lora"],
            "alpha": LORA["alpha"],
            "seed": 3,
            "precision": "fp32",
            "save_steps": 7,
            **SETTINGS,
            **changes,
        }
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        module.main([*arguments, *options])
        log = json.loads((output / "trainer_state.json").read_text())["log_history"]
        log = [entry for entry in log if "loss" in entry]
        weights = load_file(output / "model" / "model.safetensors")
        return [entry["loss"] for entry in log], weights, log

    return train


def moved(weights, case):
    """The change of all weights from the start, as one vector."""
    start = load_file(case / "base" / "model" / "model.safetensors")
    assert weights.keys() == start.keys()
    return torch.cat([(weights[name] - start[name]).flatten() for name in start])


@pytest.mark.parametrize(
    ("dtype", "of_losses", "of_weights"),
    # Whatever the model's dtype is, the trainer adds up losses in float32, and LLaMA computes norms
    # and softmax in it.
    [(torch.float32, 1e-5, 1e-3), (torch.float64, 1e-6, 1e-5)],
    ids=["float32", "float64"],
)
def test_losses_and_weights_are_those_of_the_recipe(
    case, by_recipe, by_trainer, dtype, of_losses, of_weights
):
    losses, weights = by_recipe(dtype)
    own_losses, own_weights, log = by_trainer(dtype=dtype)
    assert len(losses) == STEPS
    assert sum(losses[STEPS // 2 :]) < 0.97 * sum(losses[: STEPS // 2])
    assert sum(entry["grad_norm"] > SETTINGS["max_grad_norm"] for entry in log) > 2
    for loss, own in zip(losses, own_losses, strict=True):
        assert own == pytest.approx(loss, rel=of_losses)
    expected = moved(weights, case)
    assert expected.abs().max() > 1e-2
    assert relative_error(moved(own_weights, case), expected) < of_weights


def test_gradient_checkpointing_changes_nothing(case, by_trainer, tmp_path):
    short = {"steps": 3, "warmup": 0.3}
    losses, weights, _ = by_trainer(**short)
    again, same, _ = by_trainer("--gradient-checkpointing", output=tmp_path / "again", **short)
    assert again == pytest.approx(losses, rel=1e-6)
    assert relative_error(moved(same, case), moved(weights, case)) < 1e-4


def test_a_run_is_resumed_bit_for_bit(by_trainer, tmp_path):
    losses, weights, _ = by_trainer(dropout=0.2)
    shutil.rmtree(tmp_path / "trainer" / "checkpoint-10")
    shutil.rmtree(tmp_path / "trainer" / "model")
    with pytest.raises(ValueError, match="holds a run; --resume goes on"):
        by_trainer(dropout=0.2)
    with pytest.raises(ValueError, match=r"final_rate \(0.1\) must be that of the run \(0.2\)"):
        by_trainer("--resume", dropout=0.2, final_rate=0.1)
    again, same, _ = by_trainer("--resume", dropout=0.2)
    assert again == losses
    assert all(torch.equal(same[name], tensor) for name, tensor in weights.items())


def test_the_folder_is_one_of_a_uni_moe(case, by_trainer, tmp_path):
    by_trainer(steps=1)
    folder = tmp_path / "trainer" / "model"
    assert not list(folder.glob("adapter*"))
    model, found = UniMoEForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = UniMoEProcessor.from_pretrained(folder)
    inputs = processor.ask("what color is it?", images=[case / "media" / "0.png"])
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert ids.shape[1] > inputs["input_ids"].shape[1]
    command = ["generate", "what color is it?", "--model", str(folder)]
    assert unimoe([*command, "--image", str(case / "media" / "0.png")]) == 0


def test_a_loss_that_is_not_finite_ends_the_training(by_trainer, tmp_path):
    with pytest.raises(ValueError, match=r"loss of step \d+ \(nan\) must be finite"):
        by_trainer(learning_rate=1e30)
    assert not (tmp_path / "trainer" / "model").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/nowhere"}, "model (/nowhere) must be the folder of a Uni-MoE"),
        ({"data": "/none.json"}, "data (/none.json) must be a file"),
        ({"media": "/nowhere"}, "media_folder (/nowhere) must be a folder"),
        ({"steps": 0}, "steps (0) must be at least 1"),
        ({"accumulation": 4}, "batch_size (6) must be a multiple of accumulation (4)"),
        ({"schedule": "cosin"}, "schedule ('cosin') must be one of"),
        ({"rank": 0}, "rank (0) must be at least 1"),
        ({"alpha": 0}, "alpha (0.0) must be above 0"),
        ({"dropout": 1}, "dropout (1.0) must be at least 0 and below 1"),
        ({"precision": "fp8"}, "precision ('fp8') must be one of"),
        ({"save_steps": 0}, "save_steps (0) must be at least 1"),
        ({"seed": -1}, "seed (-1) must be at least 0"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_anything_is_written(
    by_trainer, tmp_path, changes, message
):
    with pytest.raises(ValueError, match=re.escape(message)):
        by_trainer(**changes)
    assert not (tmp_path / "trainer").exists()


def test_a_run_that_is_not_there_cannot_be_resumed(by_trainer, tmp_path):
    with pytest.raises(ValueError, match="holds no run to go on with"):
        by_trainer("--resume")
    assert not (tmp_path / "trainer").exists()


def test_the_error_without_accelerate_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ModuleNotFoundError, match=r"accelerate: pip install 'unimoe\[trainer\]'"):
        example("hf_trainer")
