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

    @cache
    def sizes_of(path: Path) -> list[tuple[str, int]]:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return [(file.name, file.stat().st_size) for file in files]

    return hashlib.sha256(repr([sizes_of(path) for path in paths]).encode()).hexdigest()[:16]
