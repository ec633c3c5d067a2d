"""Random access to parts of large files: a line of text, or a member of a tar."""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO


@dataclass(frozen=True, slots=True)
class IndexedFile:
    """A file with known offsets, which must not change while it is read.

    Attributes:
        path: path of the file.
        size: size in bytes when it was indexed.
        changed: modification time when it was indexed, in nanoseconds.
    """

    path: Path
    size: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> "IndexedFile":
        """Records the current size and modification time of a file."""
        stat = path.stat()
        return cls(path, stat.st_size, stat.st_mtime_ns)

    def read(self, offset: int, size: int) -> bytes:
        """Reads `size` bytes at `offset`.

        The file is not memory-mapped: a map would kill the process if the file became shorter.

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
        name: name of the member.
        offset: offset of its first byte in the archive.
        size: size in bytes.
    """

    tar: IndexedFile
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar.path}:{self.name}"

    def open(self, mode: str = "rb") -> BinaryIO:
        """Opens the member as an in-memory file; `mode` is ignored, as in `Path.open("rb")`."""
        return io.BytesIO(self.tar.read(self.offset, self.size))


Media = Path | TarMember
"""Location of a media file."""
