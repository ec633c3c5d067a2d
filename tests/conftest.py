"""What every test shares: the environment, seeds, threads and hypothesis profiles."""

import os

import hypothesis
import pytest
import torch

HAS_GPU = torch.cuda.is_available()

# Both are read when triton is imported or a kernel is decorated, so they come before any test file.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Triton announces another default for 3.10; a fixed one keeps results the same across versions.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

# Under the interpreter and on a shared CI machine the time of an example says nothing, and the
# same examples every time let a failure be found again.
hypothesis.settings.register_profile(
    "unimoe", deadline=None, derandomize=True, max_examples=25, print_blob=True
)
hypothesis.settings.load_profile("unimoe")


def pytest_collection_modifyitems(config, items):
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        # Not item.keywords: names of folders are among them.
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def few_threads():
    """Tensors here are small: a thread for every core of a big machine is mostly waking up.

    Processes of pytest-xdist have a core each.
    """
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    torch.set_num_threads(min(2, os.cpu_count() or 1) if alone else 1)


@pytest.fixture(autouse=True)
def seed():
    """Seeds torch for each test, so that a test does not depend on those before it."""
    torch.manual_seed(0)
    return 0
