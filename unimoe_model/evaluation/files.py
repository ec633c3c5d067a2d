"""Atomic writing and content hashes of files."""

import hashlib
from functools import cache
from pathlib import Path

from unimoe_kernels import atomic_write


def write_whole(path: Path, text: str) -> None:
    """Writes a text file atomically (`atomic_write`)."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def file_digest(path: Path) -> str:
    """Hash of a file's bytes: the first 16 hexadecimal digits of their SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def folder_digest(folder: Path) -> str:
    """Hash of the names and bytes of all files below a folder, 16 hexadecimal digits."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    named = [f"{path.relative_to(folder).as_posix()} {file_digest(path)}" for path in files]
    return hashlib.sha256("\n".join(named).encode()).hexdigest()[:16]


class SizesDigest:
    """Hash of the sizes of files, and of files in folders, without reading their bytes."""

    def __init__(self):
        self._hash = hashlib.sha256(b"[")
        self._separator = ""
        self._sizes_of = cache(_sizes_of)

    def add(self, path: Path) -> None:
        """Adds a path; raises OSError if it does not exist."""
        self._hash.update(f"{self._separator}{self._sizes_of(path)}".encode())
        self._separator = ", "

    def hexdigest(self) -> str:
        """Hash of all paths added so far, 16 hexadecimal digits."""
        whole = self._hash.copy()
        whole.update(b"]")
        return whole.hexdigest()[:16]


def _sizes_of(path: Path) -> str:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return repr([(file.name, file.stat().st_size) for file in files])
