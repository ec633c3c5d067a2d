"""All stages of training by several processes end where one process ends."""

import json
import shutil

import pytest
import torch
from launcher import found, launch
from safetensors.torch import load_file

from unimoe_kernels.testing import relative_error

STAGES = ("pretrain", "align", "experts/image", "experts/audio", "tune")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    found("stage_ranks.py", 1, folder, 0)
    return folder / "run"


def check(run, alone):
    """In float64, where the rounding of sums that are split is far below what a fault would do."""
    for stage in STAGES:
        expected = json.loads((alone / stage / "metrics.json").read_text())
        actual = json.loads((run / stage / "metrics.json").read_text())
        assert actual["tokens"] == expected["tokens"]
        losses = [torch.tensor(metrics["losses"]).double() for metrics in (actual, expected)]
        assert relative_error(*losses) < 1e-9, (stage, losses)
        expected = load_file(alone / stage / "trained.safetensors")
        actual = load_file(run / stage / "trained.safetensors")
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert actual[name].shape == tensor.shape
            # Elsewhere AdamW makes steps of rounding where gradients vanish.
            if ".router." in name:
                assert relative_error(actual[name], tensor) < 1e-9, name
        assert not (run / stage / "checkpoint").exists()


def test_two_processes_share_the_experts(alone, tmp_path):
    assert found("stage_ranks.py", 2, tmp_path, 2)["sent"] > 0
    check(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "expert"), [(2, 1), (4, 2)])
def test_other_layouts(alone, tmp_path, world, expert):
    found("stage_ranks.py", world, tmp_path, expert)
    check(tmp_path / "run", alone)


@pytest.mark.slow
def test_a_killed_stage_goes_on_with_another_number_of_processes(alone, tmp_path):
    launch("stage_ranks.py", 4, tmp_path, 2, 3)
    assert (tmp_path / "run/tune/checkpoint/.metadata").exists()
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "run", half / "run")
    found("stage_ranks.py", 2, tmp_path, 2)
    check(tmp_path / "run", alone)
    found("stage_ranks.py", 1, half, 0)
    check(half / "run", alone)
