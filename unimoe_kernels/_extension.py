"""Loads the compiled extension `_C`, or records why it cannot be loaded.

Loading it registers the C++ and CUDA operators with the dispatcher.
"""

import importlib.util
from types import ModuleType
from typing import Any

import torch  # noqa: F401  `_C` has no path of its own to libtorch: torch must be loaded first

_NAME = f"{__package__}._C"
_module: ModuleType | None = None

#: Why `_C` cannot be used; None if it is loaded.
error: str | None = None

if importlib.util.find_spec(_NAME) is None:
    error = "not compiled (pure-Python install)"
else:
    try:
        _module = importlib.import_module(_NAME)
    except ImportError as problem:
        error = f"compiled, but cannot be loaded: {problem}"

#: Whether the C++ operators (and the CUDA ones, if they were compiled) are registered.
loaded: bool = _module is not None


def build_info() -> dict[str, Any]:
    """Returns what the extension was built with.

    Returns:
        Keys `torch`, `cuda` (None without CUDA), `cuda_archs`, `compiler`, `flags`, and found at
        run time: `cpu_features`, `cpu_isas` (instruction sets that CPU kernels may use here),
        `cpu_isa` (the one they use: the best, or the one that UNIMOE_CPU_ISA names) and
        `unpacked_rows` (the largest number of rows of an expert for which its weights are not
        packed). Empty if the extension is not loaded.

    Raises:
        RuntimeError: If UNIMOE_CPU_ISA names an instruction set that this CPU lacks.
    """
    return {} if _module is None else _module.build_info()


def has_cuda() -> bool:
    """Returns whether the extension holds the CUDA operators."""
    return build_info().get("cuda") is not None
