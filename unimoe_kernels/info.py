"""What is installed and which backend each operator takes: `python -m unimoe_kernels.info`."""

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterable, Sequence

import torch

import unimoe_kernels
from unimoe_kernels import _backends, _extension

_PACKAGES = ("triton", "transformers", "numpy")


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
        ("CPU features", ", ".join(info["cpu_features"]) or "none of those looked for"),
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
    """Returns versions, how the extension was built, and one line for each operator and device."""
    facts = [
        ("unimoe_kernels", unimoe_kernels.__version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        *((package, _version(package)) for package in _PACKAGES),
        ("GPU", _describe_gpus()),
        *_describe_extension(),
        ("Triton tiles", _describe_tiles()),
    ]
    choices = [("operator", "device", "backend", "reason")]
    choices += [(row.op, row.device, row.backend, row.reason) for row in _backends.report()]
    return "\n".join([*_columns(facts), "", *_columns(choices)])


if __name__ == "__main__":
    print(describe())
