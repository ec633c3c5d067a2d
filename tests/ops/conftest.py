"""Fixtures of the operator tests."""

import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils import _device

from unimoe_kernels import available_backends, use_backend

# Modules that test files here share; --import-mode=importlib does not add this.
sys.path.insert(0, str(Path(__file__).parent))


class Backend(NamedTuple):
    """Where a test runs, and with which implementation."""

    device: str
    name: str

    @property
    def interpreted(self):
        """Whether Triton's interpreter runs it: milliseconds a program, so keep shapes small."""
        return self.device == "cpu" and self.name == "triton"


def pytest_generate_tests(metafunc):
    """Gives `backend` and `overload` every value that the operator `OP` of the module has."""
    if "backend" in metafunc.fixturenames:
        choices = []
        for device in ("cpu", "cuda"):
            marks = [pytest.mark.gpu] if device == "cuda" else []
            for name in available_backends(metafunc.module.OP, device):
                case = pytest.param(Backend(device, name), id=f"{device}-{name}", marks=marks)
                choices.append(case)
        metafunc.parametrize("backend", choices, indirect=True)
    if "overload" in metafunc.fixturenames:
        has_triton = "triton" in available_backends(metafunc.module.OP, "cpu")
        metafunc.parametrize(
            "overload", ["default", "reference"] + (["triton"] if has_triton else [])
        )


@pytest.fixture
def backend(request):
    if request.param.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    with use_backend(request.param.name):
        yield request.param


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fills what the package allocates, so that an element it forgets to write fails a test."""
    # torch lists the functions that obey `with torch.device(...)` once, when first asked. Asked
    # while they are replaced, it would forget the real ones for every later test.
    _device._device_constructors()

    def poison_of(dtype):
        if dtype.is_floating_point:
            return float("nan")
        return -(2**20) if dtype.itemsize >= 4 else torch.iinfo(dtype).max

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("unimoe_kernels"):
                tensor.fill_(poison_of(tensor.dtype))
            return tensor

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(params=["contiguous", "transposed", "sliced", "offset"])
def layout(request):
    """A function that gives a matrix another layout in memory and the same values."""

    def transposed(x):
        return x.t().contiguous().t()

    def sliced(x):
        wide = x.new_zeros(x.shape[0], 2 * x.shape[1])
        wide[:, ::2] = x
        return wide[:, ::2]

    def offset(x):
        flat = x.new_zeros(x.numel() + 1)
        flat[1:] = x.flatten()
        return flat[1:].view_as(x)

    return {
        "contiguous": lambda x: x,
        "transposed": transposed,
        "sliced": sliced,
        "offset": offset,
    }[request.param]
