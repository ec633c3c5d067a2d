"""All stages of training by several processes end where one process ends."""

import json
import shutil

import pytest

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
import torch
from launcher import found, launch
from safetensors.torch import load_file
from stage_case import STAGES, write_stages
from stage_ranks import train

from unimoe_kernels.testing import relative_error


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_stages(tmp_path_factory.mktemp("case") / "files")


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    train(folder, recipe)
    return folder / "run"


def result(run, stage):
    """Metrics and weights of a stage that is done."""
    (folder,) = run.glob(f"stages/{stage}-*")
    assert not (folder / "checkpoint").exists()
    metrics = json.loads((folder / "metrics.json").read_text())
    return metrics, load_file(folder / "model" / "model.safetensors")


def check(run, alone):
    """In float64, where the rounding of sums that are split is far below what a fault would do."""
    for stage in STAGES:
        (actual, weights), (expected, expected_weights) = (result(r, stage) for r in (run, alone))
        assert actual["tokens"] == expected["tokens"]
        losses = [torch.tensor(m["losses"], dtype=torch.float64) for m in (actual, expected)]
        assert relative_error(*losses) < 1e-9, (stage, losses)
        assert weights.keys() == expected_weights.keys()
        for name, tensor in expected_weights.items():
            assert weights[name].shape == tensor.shape
            assert weights[name].dtype == tensor.dtype == torch.float64
            # What a bias adds to all keys changes no attention: its gradient vanishes but for
            # rounding, of which AdamW makes whole steps.
            if not name.endswith(".key.bias"):
                assert relative_error(weights[name], tensor) < 1e-9, (stage, name)


@pytest.mark.slow
def test_two_processes_share_the_experts(recipe, alone, tmp_path):
    assert found("stage_ranks.py", 2, tmp_path, 2, recipe)["sent"] > 0
    check(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "layout"), [(2, "1"), (4, "2"), (2, "1-shard"), (4, "2-shard")])
def test_other_layouts(recipe, alone, tmp_path, world, layout):
    found("stage_ranks.py", world, tmp_path, layout, recipe)
    check(tmp_path / "run", alone)


def test_two_processes_shard_weights_and_share_experts(recipe, alone, tmp_path):
    assert found("stage_ranks.py", 2, tmp_path, "2-shard", recipe)["sent"] > 0
    check(tmp_path / "run", alone)


@pytest.mark.slow
def test_a_killed_stage_goes_on_with_another_number_of_processes(recipe, alone, tmp_path):
    run = tmp_path / "run"
    # Of the first stage, Muon's state is in the checkpoint.
    for world, layout, stage, step in ((2, "1-shard", "words", 2), (4, "2", "tune", 4)):
        ended = launch("stage_ranks.py", world, tmp_path, layout, recipe, stage, step)
        assert all(end.code for end in ended), ended
        (folder,) = run.glob(f"stages/{stage}-*")
        assert (folder / "checkpoint/.metadata").exists(), ended
        assert not (folder / "metrics.json").exists()
    half = tmp_path / "half"
    shutil.copytree(run, half / "run")
    assert found("stage_ranks.py", 2, tmp_path, 2, recipe)["began"] == {"tune": 3}
    check(run, alone)
    assert train(half, recipe)["began"]["tune"] == 3
    check(half / "run", alone)
