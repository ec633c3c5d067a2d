"""`unimoe train` on a recipe: all stages, interruptions, changes and errors."""

import inspect
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
import torch
from recipe_case import changed_case, write_case
from safetensors.torch import load_file

from unimoe_model.encoders import FrozenEncoder, build_encoder
from unimoe_model.encoders.outside import code_digest, permit_encoder
from unimoe_model.evaluation.files import file_digest
from unimoe_model.training import loop
from unimoe_model.training.progress import SilentReporter
from unimoe_model.training.recipe import load_recipe
from unimoe_model.training.recipe_data import RecipeData
from unimoe_model.training.run import Run, keep_recipe
from unimoe_model.training.stage_ids import stage_ids
from unimoe_model.training.starting_model import build_start, describe_start

STAGES = ("align", "eyes", "ears", "tune")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Models, media, data and the recipe; nothing in it is changed."""
    return write_case(tmp_path_factory.mktemp("case") / "files", checkpoint_seconds=0.0)


@pytest.fixture(scope="module")
def trained(case, tmp_path_factory):
    """The whole run, uninterrupted, and what it printed."""
    from unimoe_model.cli import main

    output = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", str(case), "--output", str(output)]) == 0
    return output


@pytest.fixture
def changed(case, tmp_path):
    """Copies the case with another recipe; a function of the YAML mapping edits it."""
    return partial(changed_case, case, tmp_path / "changed")


def stage_folder(output, stage):
    (folder,) = (output / "stages").glob(f"{stage}-*")
    return folder


def weights(output, stage):
    return load_file(stage_folder(output, stage) / "model" / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_each_stage_changes_what_it_trains_and_no_other(trained):
    align, eyes, ears, tune = (weights(trained, stage) for stage in STAGES)
    for expert, projector in ((eyes, False), (ears, True)):
        for name in align:
            moved = not torch.equal(align[name], expert[name])
            assert moved == (".mlp." in name or (projector and "audio_connector.projector" in name))
    assert torch.equal(
        tune["model.audio_connector.query_tokens"], align["model.audio_connector.query_tokens"]
    )
    for name, tensor in tune.items():
        if ("language_model" in name and "self_attn" in name) or "projector" in name:
            assert not torch.equal(tensor, ears[name]), name
        if "layernorm" in name or "embed" in name or "lm_head" in name:
            assert torch.equal(tensor, align[name]), name
    down = tune["model.language_model.layers.0.mlp.experts.down_proj"]
    for number, expert in enumerate((eyes, ears)):
        own = expert["model.language_model.layers.0.mlp.down_proj.weight"]
        other = (ears, eyes)[number]["model.language_model.layers.0.mlp.down_proj.weight"]
        assert (down[number] - own).norm() < (down[number] - other).norm()


def test_model_of_a_run_generates_evaluates_and_routes(trained, case, run, tmp_path):
    model = trained / "model"
    code, _, error = run("generate", "what color is it?", "--model", model)
    assert (code, error) == (0, "")
    encoders = tmp_path / "encoders.yaml"
    encoders.write_text("audio: ears:Ears\n")
    shutil.copy(case.parent / "ears.py", tmp_path)
    sound = ("--audio", case.parent / "media" / "0.wav")
    code, _, error = run("generate", "how high?", "--model", model, *sound, "--encoders", encoders)
    assert (code, error) == (0, "")
    data = case.parent / "held_out.jsonl"
    code, shown, _ = run(
        "eval", "--model", model, "--data", data, "--metric", "exact", "--output", tmp_path / "eval"
    )
    assert code == 0
    assert "3 items" in shown
    code, _, _ = run("routing", "--model", model, "--data", data, "--output", tmp_path / "routing")
    assert code == 0


def test_a_run_that_is_done_trains_nothing_and_a_change_redoes_what_depends_on_it(
    trained, changed, run, tmp_path, monkeypatch
):
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    done = []
    monkeypatch.setattr(
        "unimoe_model.training.run.train_stage",
        lambda *given, **options: done.append(given[6]) or loop.train_stage(*given, **options),
    )

    def edit(raw):
        raw["stages"][2]["learning_rate"] = 1e-3

    path = changed(lambda raw: None)
    code, shown, _ = run("train", path, "--output", output)
    assert (code, done) == (0, [])
    assert f"model in {output / 'model'}" in shown
    shutil.rmtree(path.parent)
    path = changed(edit)
    assert run("train", path, "--output", output)[0] == 0
    assert done == ["ears", "tune"]


def test_other_media_or_encoders_of_the_same_names_are_refused(
    trained, changed, run, tmp_path, monkeypatch
):
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    path = changed(lambda raw: None)
    picture = path.parent / "media" / "0.png"
    whole = picture.read_bytes()
    message = "a stage that was trained with other media or encoders of the same names"
    picture.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    code, _, error = run("train", path, "--output", output)
    assert code == 1
    assert message in error
    picture.write_bytes(whole)
    assert run("train", path, "--output", output)[0] == 0

    fingerprint = FrozenEncoder.fingerprint
    monkeypatch.setattr(FrozenEncoder, "fingerprint", lambda own: f"new {fingerprint(own)}")
    code, _, error = run("train", path, "--output", output)
    assert code == 1
    assert message in error
    # Also a stage that was not finished.
    align = stage_folder(output, "align")
    (align / "checkpoint").mkdir()
    (align / "metrics.json").unlink()
    before = (align / "inputs.json").read_bytes()
    code, _, error = run("train", path, "--output", output)
    assert code == 1
    assert message in error
    assert (align / "inputs.json").read_bytes() == before
    # One without a checkpoint starts anew.
    (align / "checkpoint").rmdir()
    assert run("train", path, "--output", output, "--stage", "align")[0] == 0
    assert (align / "inputs.json").read_bytes() != before


def test_features_of_other_code_are_not_reused(trained, case, tmp_path, monkeypatch):
    permit_encoder("ears:Ears", case.parent)
    encoder = build_encoder("ears:Ears", "audio")
    assert code_digest(encoder) == file_digest(Path(inspect.getfile(type(encoder))))
    shutil.copytree(trained / "features", tmp_path / "features")
    stores = set((tmp_path / "features").glob("*/"))
    recipe = load_recipe(case)
    data = RecipeData(recipe)
    audio = [one for one in data.media() if one[0] == "audio"][:1]
    given = (data, tmp_path, tmp_path / "features", SilentReporter(), torch.device("cpu"))
    for is_new in (False, True):
        if is_new:
            monkeypatch.setattr("unimoe_model.training.features.code_digest", lambda _: "other")
        Run(recipe, *given, is_shared=True).features.prepare(audio)
        assert (set((tmp_path / "features").glob("*/")) > stores) == is_new


@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_ends_a_run_after_a_checkpoint_and_it_goes_on_bit_for_bit(
    trained, case, run, tmp_path, monkeypatch, stage
):
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    shutil.rmtree(stage_folder(output, stage))
    expected = weights(trained, stage)
    own, steps = loop.set_learning_rates, []

    def interrupted(*arguments):
        steps.append(arguments[2])
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        own(*arguments)

    monkeypatch.setattr(loop, "set_learning_rates", interrupted)
    code = run("train", case, "--output", output, "--stage", stage)[0]
    assert code == 128 + signal.SIGTERM
    assert steps == [0, 1, 2]
    assert run("train", case, "--output", output, "--stage", stage)[0] == 0
    assert steps[3] == 3
    assert same(weights(output, stage), expected)


def test_stages_alone_or_from_one_on(case, trained, run, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    shutil.rmtree(stage_folder(output, "eyes"))
    code, _, error = run("train", case, "--output", output, "--from-stage", "tune")
    assert code == 0  # it is done already
    shutil.rmtree(stage_folder(output, "tune"))
    code, _, error = run("train", case, "--output", output, "--stage", "tune")
    assert code == 1
    assert "stage tune starts from eyes, which is not done" in error
    code, _, error = run("train", case, "--output", output, "--stage", "sing")
    assert "--stage (sing) must be a stage of" in error


def test_a_stage_alone_does_not_replace_the_model_of_a_later_one(case, trained, run, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    assert run("train", case, "--output", output, "--stage", "align")[0] == 0
    assert same(load_file(output / "model" / "model.safetensors"), weights(trained, "tune"))


def test_check_lists_stages_and_writes_nothing(case, run, tmp_path):
    output = tmp_path / "run"
    code, shown, error = run("train", case, "--output", output, "--check")
    assert (code, error) == (0, "")
    assert not output.exists()
    assert "data pictures: 60 samples, 60 image" in shown
    assert "encoder audio: ears:Ears, 8 features" in shown
    (line,) = re.findall(r"stage tune: from .*", shown)
    assert "experts eyes, ears; 6 steps of 6; trains" in line


def test_another_recipes_output_is_refused(trained, changed, run, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    code, _, error = run("train", changed(lambda raw: raw.update(seed=4)), "--output", output)
    assert code == 1
    assert "holds the run of another recipe" in error


def test_a_run_that_another_process_writes_is_refused(case, run, tmp_path):
    from unimoe_model.folder_lock import FolderLock

    output = tmp_path / "run"
    with FolderLock(output):
        code, _, error = run("train", case, "--output", output)
    assert code == 1
    assert re.search(rf"is in use by process {os.getpid()} on .* since 20", error)


def test_the_folder_of_a_run_keeps_its_recipe_and_what_the_command_line_changed(case, tmp_path):
    keep_recipe(load_recipe(case), tmp_path, {})
    assert (tmp_path / "recipe.yaml").read_text() == case.read_text()
    keep_recipe(load_recipe(case, seed=9), tmp_path, {"seed": 9})
    assert (tmp_path / "recipe.yaml").read_text() == f"# --seed 9\n{case.read_text()}"


@pytest.mark.parametrize(
    ("connectors", "field", "expected"),
    [
        ({"image": {"intermediate_size": 20}}, "vision_intermediate_size", 20),
        ({"image": {"pooled_tokens": 2}}, "vision_pooled_tokens", 2),
        ({"vocabulary_sharpness": 30}, "vocabulary_sharpness", 30),
    ],
)
def test_the_recipe_may_change_the_connectors(case, changed, connectors, field, expected):
    path = changed(lambda raw: raw["connectors"].update(connectors))
    usual, other = load_recipe(case), load_recipe(path)
    starts = [describe_start(recipe, []) for recipe in (usual, other)]
    assert [getattr(start.config, field) for start in starts] == [None, expected]
    counts = [start.processor.num_soft_tokens["image"] for start in starts]
    assert counts[1] == (2 if field == "vision_pooled_tokens" else counts[0])
    digests = dict.fromkeys(usual.data, "")
    ids = [stage_ids(recipe, "fp32", digests)["align"] for recipe in (usual, other)]
    assert ids[0] != ids[1]


@pytest.mark.parametrize(
    ("key", "connectors"),
    [
        ("image.pooled_tokens", {"image": {"pooled_tokens": 2}}),
        ("vocabulary_sharpness", {"vocabulary_sharpness": 30}),
    ],
)
def test_a_model_folder_determines_its_connectors(trained, changed, key, connectors):
    def edit(raw):
        raw.update(model=str(stage_folder(trained, "align") / "model"), connectors=connectors)

    with pytest.raises(ValueError, match=f"connectors.{key} is not supported with a model folder"):
        describe_start(load_recipe(changed(edit)), [])


def test_a_recipe_may_change_the_frames_of_a_model_folder(trained, changed):
    def edit(raw):
        del raw["connectors"]
        raw.update(model=str(stage_folder(trained, "align") / "model"), video_frames=5)

    recipe = load_recipe(changed(edit))
    start = describe_start(recipe, [])
    model = build_start(recipe, start)
    for config in (start.config, start.processor, model.config, model.model.config):
        assert config.video_num_frames == 5
    for sense in ("vision", "speech", "audio"):
        name = f"{sense}_encoder"
        assert getattr(model.config, name) == getattr(start.processor, name)


def test_recipes_read_back_what_they_say(case):
    recipe = load_recipe(case, seed=5)
    assert recipe.seed == 5
    assert [stage.name for stage in recipe.stages] == list(STAGES)
    assert recipe.stage("tune").parent == "align"
    assert recipe.stage("tune").sources == ("align", "eyes", "ears")
    assert recipe.stage("ears").optimization.accumulation == 2
    assert Path(recipe.model.llm) == case.parent / "llama"
