"""The demo's recipes: those of all variants are valid."""

import pytest
import yaml

from examples.demo.settings import ARMS, VARIANTS, fill_in_aligned, write_recipes
from unimoe_model.training.recipe import load_recipe


@pytest.mark.parametrize("name", VARIANTS)
def test_recipes_of_each_variant_can_be_read(name, tmp_path):
    files = write_recipes(tmp_path, VARIANTS[name])
    model = tmp_path / "aligned"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "unimoe"}')
    fill_in_aligned(files["dense"], model)
    recipes = {arm: load_recipe(files[arm], seed=1) for arm in ARMS}
    moe, dense = recipes["moe"], recipes["dense"]
    assert [stage.name for stage in moe.stages][-5:] == [
        "image",
        "video",
        "speech",
        "audio",
        "tune",
    ]
    assert moe.stage("tune").assembly.experts == ("image", "video", "speech", "audio")
    # Both arms see the same batches: stage 2 in turn, stage 3 alike.
    first = moe.stage("image")
    assert dense.stage("experts").seed == first.seed
    assert dense.stage("experts").streams == tuple(
        moe.stage(kind).streams[0] for kind in ("image", "video", "speech", "audio")
    )
    steps = dense.stage("experts").optimization.steps
    assert abs(steps - 4 * first.optimization.steps) <= 4
    assert dense.stage("tune").seed == moe.stage("tune").seed
    assert dense.stage("tune").streams == moe.stage("tune").streams
    if VARIANTS[name].is_full:
        widths = {arm: recipes[arm].model.sizes["intermediate_size"] for arm in ARMS}
        assert widths == {"moe": 256, "dense": 512}
        assert moe.stages[0].name == dense.stages[0].name == "pretrain"
        assert dense.stage("align").streams == moe.stage("align").streams
    else:
        assert dense.stage("experts").widen == 2


def test_a_second_call_leaves_the_files_alone(tmp_path):
    files = write_recipes(tmp_path, VARIANTS["quick"])
    before = {path: path.stat().st_mtime_ns for path in files.values()}
    assert write_recipes(tmp_path, VARIANTS["quick"]) == files
    assert {path: path.stat().st_mtime_ns for path in files.values()} == before
    assert yaml.safe_load(files["moe"].read_text())["stages"][0]["name"] == "align"
