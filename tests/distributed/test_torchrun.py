"""Runs that torchrun starts, and recipes that do not fit how a run was started."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
import torch
from launcher import HERE
from stage_case import RECIPE, STAGES, write_stages

from unimoe_model.training import start
from unimoe_model.training.recipe import load_recipe

CPU = torch.device("cpu")
CLI = ("-m", "unimoe_model.cli")


@pytest.fixture(scope="module")
def shared_experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("case") / "files"
    return write_stages(folder, parallel={"expert": 2, "timeout": 60.0})


def torchrun(recipe, output, *program):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*start, *program, "train", str(recipe), "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def done(output):
    return {path.parent.name.rpartition("-")[0] for path in output.glob("stages/*/metrics.json")}


def test_stages_under_torchrun(shared_experts, tmp_path):
    ended = torchrun(shared_experts, tmp_path, *CLI)
    assert ended.returncode == 0, ended.stderr
    assert done(tmp_path) == set(STAGES)
    # One process alone shows scores, and says where the model is.
    assert ended.stdout.count("tune: colors exact match") == 1
    assert ended.stdout.count(f"model in {tmp_path / 'model'}") == 1
    assert (tmp_path / "model/config.json").exists()


@pytest.mark.slow
def test_torchrun_ends_when_a_process_dies(shared_experts, tmp_path):
    ended = torchrun(shared_experts, tmp_path, str(HERE / "torchrun_ranks.py"))
    assert ended.returncode != 0
    assert "Signal 9" in ended.stderr
    assert done(tmp_path) == {*STAGES} - {"tune"}
    assert not (tmp_path / "model").exists()


@pytest.fixture
def recipe_of(tmp_path):
    """Reads a recipe with other values at its top."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return lambda **top: load_recipe(path, **top)


@pytest.fixture
def processes(monkeypatch):
    """Sets what torchrun would say about the number of processes."""

    def set_to(number):
        for name, value in (("WORLD_SIZE", number), ("RANK", 0)):
            if number is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, str(value))

    return set_to


@pytest.fixture
def started(monkeypatch):
    """The arguments of `start_parallel`, which starts nothing."""
    calls = []
    monkeypatch.setattr(
        start, "start_parallel", lambda *sizes, **options: calls.append((sizes, options))
    )
    return calls


def test_one_process_needs_neither_torchrun_nor_parallel(processes, started, recipe_of):
    processes(None)
    assert start.start_ranks(recipe_of(), CPU) is None
    assert start.start_ranks(recipe_of(parallel={}), CPU) is None
    assert not started


def test_several_processes_need_torchrun(processes, recipe_of):
    processes(None)
    message = r"\(data 2, expert 2\) requires 4 processes, and there is 1: start with torchrun"
    with pytest.raises(ValueError, match=message):
        start.start_ranks(recipe_of(parallel={"data": 2, "expert": 2}), CPU)


def test_without_parallel_all_processes_share_the_data(processes, started, recipe_of):
    processes(3)
    start.start_ranks(recipe_of(), CPU)
    ((sizes, _),) = started
    assert sizes == (3, 1)


def test_parallel_must_be_as_many_processes_as_torchrun_started(processes, recipe_of):
    processes(3)
    message = r"\(data 2, expert 1\) requires 2 processes, and there are 3: .*--nproc-per-node 2 "
    with pytest.raises(ValueError, match=message):
        start.start_ranks(recipe_of(parallel={"data": 2}), CPU)


def test_processes_must_have_one_recipe(processes, started, recipe_of):
    processes(2)
    parallel = {"expert": 2, "timeout": 60.0}
    for seed in (0, 0, 1):
        start.start_ranks(recipe_of(parallel=parallel, seed=seed), CPU)
    assert [sizes for sizes, _ in started] == [(1, 2)] * 3
    assert {options["timeout"] for _, options in started} == {60.0}
    first, again, other = (options["fingerprint"] for _, options in started)
    assert first == again != other
