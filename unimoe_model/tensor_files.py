"""Safetensors files that are whole or not there, with the permissions of any other file."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from unimoe_kernels import atomic_write


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Replaces a file of tensors whole or not at all (`atomic_write`).

    Args:
        path: the file, replaced if it exists.
        tensors: contiguous, by name.
        metadata: texts kept beside them.
    """
    with atomic_write(path) as partial:
        save_file(dict(tensors), partial, metadata=metadata and dict(metadata))


def permit_as_usual(path: Path) -> None:
    """Gives a file the mode of one that is newly made beside it, as the umask says.

    safetensors makes its files readable by their owner alone.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.mode")
    try:
        beside.touch()
        path.chmod(beside.stat().st_mode & 0o7777)
    finally:
        beside.unlink(missing_ok=True)
