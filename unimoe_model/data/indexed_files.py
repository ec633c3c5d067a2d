"""Pieces of large files, read by where they lie: a line of text, a member of a tar."""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO


@dataclass(frozen=True, slots=True)
class IndexedFile:
    """A file whose pieces have been located, and which must not change while they are read.

    Attributes:
        path: of the file.
        size: in bytes, when it was indexed.
        changed: time of its last change then, in nanoseconds.
    """

    path: Path
    size: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> "IndexedFile":
        """The file as it is now."""
        stat = path.stat()
        return cls(path, stat.st_size, stat.st_mtime_ns)

    def read(self, offset: int, size: int) -> bytes:
        """The bytes of a piece.

        A read instead of a memory map: a map kills the process where the file has become shorter.

        Raises:
            ValueError: If the file has changed since it was indexed.
        """
        with self.path.open("rb") as file:
            stat = os.fstat(file.fileno())
            if (stat.st_size, stat.st_mtime_ns) != (self.size, self.changed):
                raise ValueError(f"data ({self.path}) has changed since it was read; start again")
            file.seek(offset)
            return file.read(size)


@dataclass(frozen=True, slots=True)
class TarMember:
    """A member of an uncompressed tar, read in place.

    Attributes:
        tar: the archive.
        name: of the member.
        offset: of its first byte in the archive.
        size: in bytes.
    """

    tar: IndexedFile
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar.path}:{self.name}"

    def open(self, mode: str = "rb") -> BinaryIO:
        """The member as an open file, which holds its bytes in memory; `mode` is that of `Path`."""
        return io.BytesIO(self.tar.read(self.offset, self.size))


Media = Path | TarMember
"""Where a media file is."""
