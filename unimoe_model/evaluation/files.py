"""Files that are whole or not there, and names for what they hold."""

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from unimoe_kernels import atomic_write


def write_whole(path: Path, text: str) -> None:
    """Replaces a file of text whole or not at all (`atomic_write`)."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def file_digest(path: Path) -> str:
    """Name of a file's bytes, 16 digits of their SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def folder_digest(folder: Path) -> str:
    """Name of the names and bytes of all files in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    named = [f"{path.relative_to(folder).as_posix()} {file_digest(path)}" for path in files]
    return hashlib.sha256("\n".join(named).encode()).hexdigest()[:16]


def sizes_digest(paths: Iterable[Path]) -> str:
    """Name of the sizes of files, and of the files in folders; their bytes are not read."""
    digest = SizesDigest()
    for path in paths:
        digest.add(path)
    return digest.hexdigest()


class SizesDigest:
    """`sizes_digest` of paths that come one by one."""

    def __init__(self):
        self._hash = hashlib.sha256(b"[")
        self._separator = ""
        self._sizes_of = cache(_sizes_of)

    def add(self, path: Path) -> None:
        """Takes the next path; raises OSError if nothing is there."""
        self._hash.update(f"{self._separator}{self._sizes_of(path)}".encode())
        self._separator = ", "

    def hexdigest(self) -> str:
        """Of all paths that were added, 16 digits."""
        whole = self._hash.copy()
        whole.update(b"]")
        return whole.hexdigest()[:16]


def _sizes_of(path: Path) -> str:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return repr([(file.name, file.stat().st_size) for file in files])
