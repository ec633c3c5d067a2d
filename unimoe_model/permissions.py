"""File permissions of weights."""

import os
from pathlib import Path


def permit_as_usual(path: Path) -> None:
    """Sets the mode of a file to that of a new file in its folder, according to the umask.

    safetensors creates files that only their owner can read.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.mode")
    try:
        beside.touch()
        path.chmod(beside.stat().st_mode & 0o7777)
    finally:
        beside.unlink(missing_ok=True)
