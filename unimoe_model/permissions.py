"""Permissions of files of tensors."""

import os
from pathlib import Path


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
