"""Sources of media files: paths, bytes, open files, and rows of Hugging Face datasets."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from unimoe_model.data.indexed_files import TarMember


def as_source(item: Any) -> Path | BinaryIO | None:
    """Converts a file in any supported form to a path or a binary file.

    Args:
        item: a path, the bytes of a file, a file open for reading, a member of a tar, or the
            `{"bytes", "path"}` of Hugging Face datasets with decoding switched off.

    Returns:
        A path, or a seekable file at its start (an open file is rewound); None if `item` is none
        of these.
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
    """Raises ValueError if `source` is a path but not that of a file."""
    if isinstance(source, Path) and not source.is_file():
        raise ValueError(f"file {source} must be {expected}; there is no such file")


def label(source: Path | BinaryIO) -> str:
    """Name of a source in error messages."""
    return str(source) if isinstance(source, Path) else f"<{type(source).__name__}>"
