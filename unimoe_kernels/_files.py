"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Gives a name to write under; after the block the file has its own, with the umask's mode.

    A kill or an error in the block leaves the file as it was before. Whatever mode the block's
    writer chooses (safetensors makes files readable by their owner alone) is replaced.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.touch()
        mode = partial.stat().st_mode & 0o777
        yield partial
        partial.chmod(mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
