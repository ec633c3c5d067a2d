"""Media files in whatever form a user has them: paths, bytes, open files, rows of datasets."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from unimoe_model.data.indexed_files import TarMember


def as_source(item: Any) -> Path | BinaryIO | None:
    """What a file is read from, or None if `item` is no file.

    Args:
        item: a path, the bytes of a file, a file open for reading, a member of a tar, or the
            `{"bytes", "path"}` that Hugging Face datasets make of media that are not decoded.

    Returns:
        A path, or a file at its start; an open file is rewound, so that it can be read again.
    """
    if isinstance(item, Mapping) and ("bytes" in item or "path" in item):
        item = item["path"] if item.get("bytes") is None else item["bytes"]
    if isinstance(item, str | os.PathLike):
        return Path(os.fsdecode(item))
    if isinstance(item, bytes | bytearray | memoryview):
        return io.BytesIO(item)
    if isinstance(item, TarMember):
        return item.open()
    if not hasattr(item, "read"):
        return None
    if not (hasattr(item, "seekable") and item.seekable()):
        return io.BytesIO(item.read())
    item.seek(0)
    return item


def require_file(source: Path | BinaryIO, expected: str) -> None:
    """Raises ValueError if `source` is the path of no file."""
    if isinstance(source, Path) and not source.is_file():
        raise ValueError(f"file {source} must be {expected}; there is no such file")


def label(source: Path | BinaryIO) -> str:
    """What errors call a source."""
    return str(source) if isinstance(source, Path) else f"<{type(source).__name__}>"
