"""The caching allocator for CPU tensors."""

import importlib.machinery
import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unimoe_kernels import caching_allocator

CHECKER = Path(__file__).with_name("allocator_checks.py")
CHECKS = runpy.run_path(str(CHECKER))["CHECKS"]

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("unimoe_kernels._caching_allocator") is None,
    reason="the caching allocator is not compiled",
)


@pytest.fixture
def not_in_use(monkeypatch):
    """Tests of commands put the allocator to use in their process."""
    monkeypatch.setattr(caching_allocator, "_library", None)


@pytest.fixture(scope="module")
def failures():
    """Traceback or None by the name of a check."""
    done = subprocess.run([sys.executable, CHECKER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_library
@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_allocator(failures, name):
    assert failures[name] is None, failures[name]


@needs_library
@pytest.mark.usefixtures("not_in_use")
def test_another_torch_keeps_its_own_allocator(monkeypatch):
    release = torch.__version__.split("+")[0]
    monkeypatch.setattr(torch, "__version__", "2.99.1+cpu")
    reason = caching_allocator.use_caching_allocator()
    assert reason == f"compiled with torch {release}, not 2.99.1+cpu"
    assert caching_allocator.unusable_reason() == reason
    tensor = torch.ones(2**20)
    assert caching_allocator.memory_stats() == (0, 0, 0)
    assert tensor.sum() == 2**20


@pytest.mark.usefixtures("not_in_use")
def test_an_install_without_the_library_keeps_the_allocator_of_torch(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert caching_allocator.use_caching_allocator() == "not compiled"
    caching_allocator.empty_cache()
    assert caching_allocator.memory_stats() == (0, 0, 0)


@pytest.mark.usefixtures("not_in_use")
def test_a_broken_library_keeps_the_allocator_of_torch(monkeypatch, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    spec = importlib.machinery.ModuleSpec("broken", None, origin=str(broken))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert "cannot be loaded" in caching_allocator.use_caching_allocator()
