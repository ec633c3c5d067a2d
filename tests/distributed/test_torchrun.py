"""Runs that torchrun starts, and settings that do not fit how a run was started."""

import dataclasses
import os
import subprocess
import sys

import pytest
import stage_ranks
import torch
from launcher import HERE

from unimoe_model.training.settings import ParallelSettings
from unimoe_model.training.start import start_ranks

CPU = torch.device("cpu")


def torchrun(folder, expert, victim):
    script = [HERE / "torchrun_ranks.py", folder, str(expert), str(victim)]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *script],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def test_stages_under_torchrun(tmp_path):
    ended = torchrun(tmp_path, 2, -1)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run/tune/metrics.json").exists()
    assert (tmp_path / "found.json").exists()


@pytest.mark.slow
def test_torchrun_ends_when_a_process_dies(tmp_path):
    ended = torchrun(tmp_path, 2, 1)
    assert ended.returncode != 0
    assert "Signal 9" in ended.stderr
    assert not (tmp_path / "run/tune/metrics.json").exists()


def with_parallel(**fields):
    return dataclasses.replace(stage_ranks.settings(), parallel=ParallelSettings(**fields))


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


def test_one_process_needs_neither_torchrun_nor_settings(processes):
    processes(None)
    assert start_ranks(stage_ranks.settings(), CPU) is None
    assert start_ranks(with_parallel(), CPU) is None


def test_several_processes_need_torchrun(processes):
    processes(None)
    with pytest.raises(ValueError, match="needs 4 processes: start with torchrun"):
        start_ranks(with_parallel(data=2, expert=2), CPU)


def test_torchrun_needs_settings(processes):
    processes(2)
    with pytest.raises(ValueError, match="config must say how 2 processes share the work"):
        start_ranks(stage_ranks.settings(), CPU)


def test_sizes_must_be_what_torchrun_started(processes):
    processes(3)
    with pytest.raises(ValueError, match=r"\(data 2, expert 1\) must be as many processes"):
        start_ranks(with_parallel(data=2), CPU)
