"""Distillation from the model that a recipe starts from, for data named by `distill`."""

import json
import re
from dataclasses import replace

import pytest
import torch
import yaml

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
from recipe_case import write_case

from unimoe_kernels.testing import relative_error
from unimoe_model.encoders.outside import permit_encoder
from unimoe_model.training.batches import DISTILLED, Batches, sample_order
from unimoe_model.training.gradients import Objective, add_gradients
from unimoe_model.training.loss import answer_loss, distillation_loss
from unimoe_model.training.optimization import Optimization
from unimoe_model.training.ranks import Ranks
from unimoe_model.training.recipe import (
    LanguageModel,
    Parallel,
    Recipe,
    Stage,
    TrainedPart,
    load_recipe,
)
from unimoe_model.training.recipe.schema import DataFile
from unimoe_model.training.recipe_data import RecipeData
from unimoe_model.training.stage_ids import stage_ids
from unimoe_model.training.starting_model import build_start, describe_start, load_whole


@pytest.fixture
def model(tiny_model):
    return tiny_model(num_experts=0)


@pytest.fixture
def teacher(tiny_model):
    torch.manual_seed(1)
    teacher = tiny_model(num_experts=0)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return teacher.requires_grad_(False)


@pytest.fixture
def batch():
    """Two texts with five labelled tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(40, 64, (2, 8), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[0, 5:8], labels[1, 6:8] = ids[0, 5:8], ids[1, 6:8]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def reference(model, teacher, batch):
    """The mean divergence by loops in float64."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = [own.lm_head(own.hidden_states(**inputs)) for own in (model, teacher)]
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, column in (batch["labels"] != -100).nonzero().tolist():
        q, p = (own[row, column - 1].softmax(-1) for own in logits)
        total = total + (p * (p.log() - q.log())).sum()
        count += 1
    return total / count


@pytest.mark.parametrize("multiple", [1, 8])
def test_loss_and_gradients_are_those_of_loops_in_float64(model, teacher, batch, multiple):
    parameters = [p for n, p in model.named_parameters() if "language_model" in n]
    loss = distillation_loss(model, teacher, batch, pad_to_multiple_of=multiple)
    found = torch.autograd.grad(loss, parameters)
    model.double(), teacher.double()
    doubles = [p for n, p in model.named_parameters() if "language_model" in n]
    expected = reference(model, teacher, batch)
    wanted = torch.autograd.grad(expected, doubles)
    assert expected > 0.05
    assert relative_error(loss, expected) < 1e-4
    for ours, theirs in zip(found, wanted, strict=True):
        assert relative_error(ours, theirs) < 1e-3


@pytest.mark.parametrize("count", [None, torch.tensor(7)])
def test_more_rows_of_logits_change_neither_loss_nor_gradients(model, batch, count):
    model.double()
    parameters = [p for n, p in model.named_parameters() if "language_model" in n]
    losses = [answer_loss(model, batch, count, multiple) for multiple in (1, 8)]
    assert losses[0] > 0.05
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-12)
    for own, padded in zip(*(torch.autograd.grad(x, parameters) for x in losses), strict=True):
        assert relative_error(padded, own) < 1e-9


def test_the_teachers_own_predictions_give_no_gradient(model, batch):
    """A cross entropy of the same tokens has one."""
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    kept = torch.autograd.grad(distillation_loss(model, model, batch), weight)[0]
    learned = torch.autograd.grad(answer_loss(model, batch), weight)[0]
    assert kept.norm() < 1e-4 * learned.norm()


def test_the_loss_is_a_mean_over_learned_and_one_over_distilled_tokens(model, teacher, batch):
    """However many parts they are divided into, and however many tokens there are of each."""
    model.double(), teacher.double()
    rows = [{key: value[at : at + 1] for key, value in batch.items()} for at in (0, 1)]
    marked = [part | {DISTILLED: torch.tensor(3.0)} for part in (rows[0], rows[1], rows[1])]
    objective = Objective(teacher=teacher)
    value, tokens = add_gradients(model, [rows[0], *marked], objective, Ranks(), "stage")
    distilled = {key: torch.cat([batch[key], batch[key][1:]]) for key in batch}
    expected = answer_loss(model, rows[0]) + 3 * reference(model, teacher, distilled)
    assert value == pytest.approx(expected.item(), rel=1e-9)
    assert tokens == 32


def test_all_tokens_of_distilled_samples_are_labelled(tmp_path):
    case = write_case(tmp_path / "case")
    lines = [{"id": i, "question": f"how many {i}?", "answer": f"{i}"} for i in range(4)]
    texts = "".join(json.dumps(line) + "\n" for line in lines)
    (case.parent / "texts.jsonl").write_text(texts)
    raw = yaml.safe_load(case.read_text())
    raw["data"] = {"learned": "texts.jsonl", "kept": "texts.jsonl"}
    own = raw["stages"][0] | {"train": ["attention"], "data": ["learned", "kept"]}
    own |= {"batch_size": 8, "pack": True, "max_length": 48, "distill": "kept"}
    raw |= {"stages": [own], "evaluate": {}}
    case.write_text(yaml.safe_dump(raw))
    permit_encoder("ears:Ears", case.parent)
    asked = load_recipe(case)
    data, (found,) = RecipeData(asked), asked.stages
    processor = describe_start(asked, data.texts()).processor
    settings = found.optimization_for(data.counts())
    made = Batches(processor, sample_order(found, data.samples, 0), found, settings, None)
    learned, kept = made(0)
    assert DISTILLED not in learned
    assert kept[DISTILLED] == found.distill_weight
    # The first token of each packed sample cannot be predicted.
    is_first, is_padding = kept["position_ids"] == 0, ~kept["token_mask"]
    expected = kept["input_ids"].masked_fill(is_first | is_padding, -100)
    assert torch.equal(kept["labels"], expected)
    labelled = [
        (part["labels"] != -100).sum() / part["token_mask"].sum() for part in (learned, kept)
    ]
    assert 0 < labelled[0] < 0.5
    assert labelled[1] > 0.8


def stage(**options):
    settings = Optimization(steps=1, batch_size=1, learning_rate=1e-3)
    parts = (TrainedPart("attention"),)
    return Stage("align", "model", parts, ({"own": 1.0, "kept": 1.0},), settings, **options)


def recipe(own, **options):
    data = {"own": DataFile("f"), "kept": DataFile("g")}
    return Recipe("r.yaml", LanguageModel(llm="m"), data, (own,), **options)


def test_what_cannot_be_distilled_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"distill \('chat'\) must be among the data .*own, kept"):
        stage(distill=("chat",))
    with pytest.raises(ValueError, match=r"distill_weight \(0\) must be above 0"):
        stage(distill=("kept",), distill_weight=0)
    with pytest.raises(ValueError, match=r"distill_weight \(2\) requires distill"):
        stage(distill_weight=2)
    with pytest.raises(ValueError, match="distill and objective: words exclude each other"):
        replace(stage(distill=("kept",)), objective="words", train=(TrainedPart("connectors"),))
    recipe(stage(distill=("kept",)), parallel=Parallel(data=1))
    message = r"stages\.align\.distill requires a run of one process; this run has 2"
    with pytest.raises(ValueError, match=message):
        recipe(stage(distill=("kept",)), parallel=Parallel(data=2))


def test_data_with_media_are_refused(tmp_path):
    (tmp_path / "f.jsonl").write_text('{"id": 1, "question": "what?", "answer": "this"}\n')
    line = '{"id": 1, "image": "a.png", "question": "what?", "answer": "this"}\n'
    (tmp_path / "g.jsonl").write_text(line)
    (tmp_path / "a.png").touch()
    data = {name: DataFile(str(tmp_path / f"{name}.jsonl")) for name in ("f", "g")}
    own = replace(stage(), streams=({"f": 1.0, "g": 1.0},))
    asked = recipe(own)
    RecipeData(replace(asked, data=data, stages=(replace(own, distill=("f",)),)))
    with pytest.raises(ValueError, match=r"stages\.align\.distill \(g\) .* media; g has image"):
        RecipeData(replace(asked, data=data, stages=(replace(own, distill=("g",)),)))


def test_it_names_a_stage_only_where_it_is_used():
    own = stage()
    digests = {"own": "d", "kept": "e"}
    ids = {
        names: stage_ids(recipe(replace(own, distill=names)), "fp32", digests)["align"]
        for names in ((), ("kept",), ("own",))
    }
    assert len(set(ids.values())) == 3


def test_training_keeps_the_predictions_for_texts(tmp_path, run):
    """Text that a stage distills changes less than where the stage does not see it."""
    case = write_case(tmp_path / "case")
    lines = [
        {"id": i, "question": f"how many {i}?", "answer": f"{i} and {i * 7} of them"}
        for i in range(40)
    ]
    texts = "".join(json.dumps(line) + "\n" for line in lines)
    (case.parent / "texts.jsonl").write_text(texts)
    raw = yaml.safe_load(case.read_text())
    raw["data"]["texts"] = "texts.jsonl"
    own = raw["stages"][0]
    own |= {"train": {"attention": "whole", "ffn": "whole"}, "steps": 30, "batch_size": 12}
    own |= {"data": {"pictures": 1, "texts": 1}, "accumulation": 2}
    raw |= {"stages": [own], "evaluate": {}}
    kept = {"distill": "texts", "distill_weight": 10}
    changes = {}
    for name, options in (("kept", kept), ("lost", {"data": ["pictures"]})):
        raw["stages"] = [own | options]
        case.write_text(yaml.safe_dump(raw))
        code, shown, errors = run("train", case, "--output", tmp_path / name)
        assert code == 0, errors
        changes[name] = _change(case, tmp_path / name / "model", lines)
    assert 0 < changes["kept"] < 0.2 * changes["lost"]
    code, shown, _ = run("train", case, "--check")
    assert "teacher" not in shown
    raw["stages"] = [own | {"distill": "texts"}]
    case.write_text(yaml.safe_dump(raw))
    code, shown, _ = run("train", case, "--check")
    assert re.search(r"stage align: [\d.]+ GiB: weights .*, teacher [\d.]+", shown)


def _change(case, folder, lines) -> float:
    """Mean divergence of a trained model from the LLM, at the answers of texts."""
    recipe = load_recipe(case)
    permit_encoder("ears:Ears", case.parent)
    start = describe_start(recipe, ())
    models = [load_whole(folder), build_start(recipe, start)]
    texts = [start.processor.tokenize([(own["question"], own["answer"])]) for own in lines]
    batch = dict(start.processor.collate(start.processor.rows(texts, {}, None)))
    with torch.no_grad():
        return distillation_loss(*models, batch).item()
