"""The recipes of examples/smol."""

from dataclasses import replace

import pytest

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
import yaml

from examples.smol.results import LEARNED_FROM
from examples.smol.settings import ARMS, EXPERTS, HERE, arm_recipe, write_recipe
from unimoe_model.training.recipe import load_recipe
from unimoe_model.training.widening import widened


@pytest.fixture
def folder(tmp_path):
    """A folder of a run whose data files are there."""
    recipe = arm_recipe("moe")
    for file in [*recipe["data"].values(), *(own["data"] for own in recipe["evaluate"].values())]:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "language_model").mkdir()
    (tmp_path / "language_model/config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def test_all_arms_see_the_same_data(folder):
    moe, dynamic, dense = (load_recipe(write_recipe(folder, arm, 3), seed=3) for arm in ARMS)
    assert dynamic.stages[:-1] == moe.stages[:-1]
    assert replace(dynamic.stages[-1], assembly=moe.stages[-1].assembly) == moe.stages[-1]
    assert dynamic.stages[-1].assembly.options["moe_options"]["num_null_experts"] == 1
    assert [stage.name for stage in moe.stages] == ["words", "align", *EXPERTS, "tune"]
    assert [stage.name for stage in dense.stages] == ["words", "align", "experts", "tune"]
    assert dense.model == moe.model
    for name in ("words", "align"):
        assert dense.stage(name) == moe.stage(name)
    experts = dense.stage("experts")
    steps = {name: moe.stage(name).optimization.steps for name in EXPERTS}
    assert experts.optimization.steps == sum(steps.values())
    (mixed,) = experts.streams
    assert set(mixed) == {data for name in EXPERTS for data in moe.stage(name).data}
    for data, weight in mixed.items():
        expected = sum(
            steps[name] * own.get(data, 0) / sum(own.values())
            for name in EXPERTS
            for own in moe.stage(name).streams
        )
        assert weight == pytest.approx(expected, rel=0.01)
    assert sum(mixed.values()) == pytest.approx(experts.optimization.steps, rel=0.01)
    assert experts.seed == moe.stage(EXPERTS[0]).seed
    assert experts.distill == moe.stage("text").distill == ("chat", "writing")
    assert [moe.stage(name).distill for name in EXPERTS[:3]] == [()] * 3
    for key in ("streams", "seed", "optimization", "max_length", "pack", "distill"):
        assert getattr(dense.stage("tune"), key) == getattr(moe.stage("tune"), key)


def test_experts_are_in_ten_layers_and_the_dense_ffns_are_as_many_units(folder):
    moe = load_recipe(write_recipe(folder, "moe", 0))
    assembly = moe.stage("tune").assembly
    assert assembly.experts == EXPERTS
    layers = assembly.layers
    assert len(layers) == 10
    for stage in moe.stages[1:]:
        assert all(part.layers == tuple(layers) for part in stage.train if part.part == "ffn")
    active = (30 - len(layers)) * 1536 + len(layers) * assembly.top_k * 1536
    experts = load_recipe(write_recipe(folder, "dense", 0)).stage("experts")
    assert active == 30 * widened(1536, experts.widen)
    assert experts.train[0] == moe.stage(EXPERTS[0]).train[0]


def test_what_is_not_there_is_left_out_of_the_recipe(folder):
    for name in ("train/sound", "test/sound", "test/digit"):
        (folder / "data" / f"{name}.jsonl").unlink()
    recipe = yaml.safe_load(write_recipe(folder, "moe", 0).read_text())
    assert "sound" not in recipe["data"]
    assert not {"sound", "digit"} & set(recipe["evaluate"])
    assert all("sound" not in stage["data"] for stage in recipe["stages"])
    load_recipe(folder / "moe-0.yaml")
    for name in ("chat", "writing"):
        (folder / f"data/train/{name}.jsonl").unlink()
    with pytest.raises(ValueError, match="stage text has no data"):
        write_recipe(folder, "moe", 0)


def test_a_quick_run_takes_few_steps_and_a_second_call_leaves_the_file(folder):
    path = write_recipe(folder, "dense", 1, quick=True)
    assert {stage.optimization.steps for stage in load_recipe(path).stages} == {3}
    written = path.stat().st_mtime_ns
    assert write_recipe(folder, "dense", 1, quick=True) == path
    assert path.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"arm \('sparse'\) must be one of moe, dynamic, dense"):
        write_recipe(folder, "sparse", 0)


def test_every_held_out_task_is_learned_from_one():
    recipe = arm_recipe("moe")
    for task in recipe["evaluate"]:
        assert LEARNED_FROM.get(task, task) in recipe["data"]


def test_the_chat_uses_the_encoders_of_the_recipe():
    encoders = yaml.safe_load((HERE / "encoders.yaml").read_text())
    assert encoders == arm_recipe("moe")["encoders"]
