"""Versions, build and the backend of each operator: `python -m unimoe_kernels.info`."""

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

import unimoe_kernels
from unimoe_kernels import _backends, _extension, caching_allocator

_PACKAGES = ("triton", "transformers", "numpy")


class BackendChoice(NamedTuple):
    """The backend that an operator uses on a device, and the reason.

    Attributes:
        op: name of the operator.
        device: device type, `"cpu"` or `"cuda"`.
        backend: name of the backend.
        reason: one line of text.
    """

    op: str
    device: str
    backend: str
    reason: str


def backend_choices() -> list[BackendChoice]:
    """Returns the backend of every public operator on every device type."""
    return [
        BackendChoice(operator.name, device, operator.backend_on(device), _reason(operator, device))
        for operator in _backends.operators(public=True)
        for device in operator.available
    ]


def _reason(operator: _backends.Operator, device: str) -> str:
    backend = operator.backend_on(device)
    if backend == _backends.forced():
        return "forced by use_backend or UNIMOE_BACKEND"
    if backend == "triton" and operator.runs_kernels_on(device):
        return "compiled; not the default until its GPU tests have passed: UNIMOE_BACKEND=cuda"
    compiled = operator.is_compiled_for(device)
    if operator.parts and not (operator.fused if backend == "triton" else compiled):
        having = [
            part.name
            for part in _backends.operators()
            if part.name in operator.parts and backend in part.backends_on(device)
        ]
        if backend == "reference":
            return "none of its parts has a kernel here"
        return f"composed; {backend} runs {', '.join(having)}"
    if backend == "triton":
        return "no CUDA kernel in the extension"
    if backend == "reference":
        return f"plain torch: there is no {'C++' if device == 'cpu' else 'CUDA or Triton'} kernel"
    return f"compiled into {_backends.EXTENSION}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _describe_gpus() -> str:
    if not torch.cuda.is_available():
        return "none visible"
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return ", ".join(names)


def _describe_extension() -> list[tuple[str, str]]:
    if not _extension.loaded:
        return [("extension", str(_extension.error))]
    info = _extension.build_info()
    cuda = info["cuda"]
    return [
        ("extension", f"loaded; built with torch {info['torch']}, {info['compiler']}"),
        ("  flags", info["flags"]),
        ("  CUDA", f"{cuda}, archs {info['cuda_archs']}" if cuda else "not compiled"),
        ("CPU features", ", ".join(info["cpu_features"]) or "none that the kernels use"),
        ("CPU kernels", f"{info['cpu_isa']} (UNIMOE_CPU_ISA: {', '.join(info['cpu_isas'])})"),
    ]


def _describe_tiles() -> str:
    if importlib.util.find_spec("triton") is None:
        return "none: triton is not installed"
    from unimoe_kernels._triton import table

    try:
        found = table.load()
    except ValueError as error:
        return str(error)
    own = os.environ.get(table.VARIABLE)
    source = f"the shipped table and {table.VARIABLE} ({own})" if own else "the shipped table"
    way = "" if found.descriptors else "; descriptors are off"
    return f"{len(found.tiles)} problems measured in {source}{way}"


def _columns(rows: Iterable[Sequence[str]]) -> list[str]:
    rows = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def describe() -> str:
    """Returns versions, the build of the extension, and a line per operator and device."""
    facts = [
        ("unimoe_kernels", unimoe_kernels.__version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        *((package, _version(package)) for package in _PACKAGES),
        ("GPU", _describe_gpus()),
        *_describe_extension(),
        ("CPU allocator", caching_allocator.unusable_reason() or "can be used"),
        ("Triton tiles", _describe_tiles()),
    ]
    choices = [("operator", "device", "backend", "reason")]
    choices += [(row.op, row.device, row.backend, row.reason) for row in backend_choices()]
    return "\n".join([*_columns(facts), "", *_columns(choices)])


if __name__ == "__main__":
    print(describe())
