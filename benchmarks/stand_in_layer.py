"""`moe_mlp` without gradients on a stand-in for a GPU, in Triton or CUDA C++.

The remaining time of a call is its host time. Host code of the CUDA sources is compiled for the CPU
with a launcher that has no effect, and Triton has such a driver. Both exclude the time of the CUDA
driver, and C++ also that of setting the device and getting the stream.
"""

import functools
import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

from unimoe_kernels import _backends
from unimoe_kernels.ops import cuda_matmul

from .candidates import UnavailableError

HOPPER = cuda_matmul.Gpu((9, 0), ("9.0a",))
NAMESPACE = "unimoe_stand_in"
# Operators that have kernels for the CPU under their own names.
PARTS = ("expert_sort", "permute", "unpermute", "unpermute_backward")
SOURCES = ("expert_sort", "permute", "grouped_mm_few_rows", "grouped_mm_sm90", "moe_mlp_sm90")
SOURCES += ("moe_mlp", "tensor_map", "tensor_map_encode")

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def _emulated() -> ModuleType:
    """The tests' module that turns CUDA sources into C++; tests are no package."""
    path = Path(__file__).parents[1] / "tests" / "ops" / "emulated.py"
    spec = importlib.util.spec_from_file_location("emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def load_host_code() -> None:
    """Compiles and loads what the host does in CUDA C++."""
    emulated = _emulated()
    if emulated.COMPILER == [None]:
        raise UnavailableError("requires a C++ compiler")
    for part in PARTS:
        (schema,) = torch._C._jit_get_schemas_for_operator(f"unimoe::{part}")[:1]
        _library.define(str(schema).removeprefix("unimoe::"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        emulated.copy_sources(folder)
        for source in ("expert_sort", "permute"):
            path = folder / f"{source}.cpp"
            path.write_text(path.read_text().replace("(unimoe, CPU, m)", f"({NAMESPACE}, CPU, m)"))
        sources = [folder / f"{source}.cpp" for source in SOURCES]
        flags = ("-shared", "-fPIC", "-O2", "-w", "-DUNIMOE_LAUNCHES_NOTHING")
        library = emulated.compile_sources(folder, sources, folder / "host.so", *flags)
        torch.ops.load_library(str(library))


@contextmanager
def stand_in_layer(way: str) -> Iterator[None]:
    """Allows `moe_mlp` to be called on CPU tensors, without effect.

    Args:
        way: `"cuda"`, one call for all launches; `"triton"`, with sort and sum in CUDA C++; or
            `"triton-alone"`.
    """
    from .stand_in_driver import stand_in

    load_host_code()
    backends = dict.fromkeys(("expert_sort", "unpermute"), "cuda") | {"moe_mlp": "cuda"}
    if way != "cuda":
        backends["moe_mlp"] = "triton"
    if way == "triton-alone":
        backends = dict.fromkeys(backends, "triton")
    with ExitStack() as stack:
        stack.enter_context(stand_in())
        stack.enter_context(mock.patch.object(cuda_matmul, "STAND_IN", HOPPER))
        for op, backend in backends.items():
            operator = _backends._operators[op]
            stack.enter_context(mock.patch.dict(operator.available, {"cpu": (backend,)}))
            if op in PARTS:
                ours = getattr(getattr(torch.ops, NAMESPACE), op).default
                stack.enter_context(mock.patch.dict(operator.overloads, {"default": ours}))
        yield
