"""Offsets of the members of an uncompressed tar."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

from unimoe_model.data.indexed_files import IndexedFile, TarMember

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_BLOCK = 512


def tar_members(file: IndexedFile) -> Iterator[TarMember]:
    """Yields the files of a tar in order, skipping folders.

    Raises:
        ValueError: If it is compressed, truncated or damaged, has data after its end, or has
            members other than files and folders, such as links.
    """
    path = file.path
    with path.open("rb") as raw:
        start = raw.read(_BLOCK)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise ValueError(f"shard ({path}) must be an uncompressed tar; it is {name}")
    try:
        with tarfile.open(path, "r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # tarfile would keep all of them in memory
                if info.isdir():
                    continue
                if not info.isreg() or info.issparse():
                    raise ValueError(f"shard ({path}) member {info.name} must be a plain file")
                yield TarMember(file, info.name.removeprefix("./"), info.offset_data, info.size)
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(f"shard ({path}) must be a whole, uncompressed tar: {error}") from error
    _require_end(path, end)


def _require_end(path: Path, end: int) -> None:
    """Raises ValueError if a tar has data after `end`, where tarfile stopped without an error."""
    with path.open("rb") as raw:
        raw.seek(end)
        rest = raw.read(_BLOCK)
        if len(rest) < _BLOCK:
            raise ValueError(f"shard ({path}) must end with a block of zeros; it is cut off")
        while rest:
            if rest.strip(b"\0"):
                raise ValueError(
                    f"shard ({path}) is damaged, or another tar was appended, at byte {end}"
                )
            rest = raw.read(1 << 20)
