"""Content hashes of media files, cached for files that have not changed."""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from unimoe_model.data.indexed_files import Media, TarMember
from unimoe_model.data.sources import require_file
from unimoe_model.full_disk import naming_full_disk


class DigestMemo:
    """Cache of SHA-256 digests by absolute path, size and modification time of a file.

    A member of a tar is identified by its offset and the archive's modification time. Digests are
    stored in `<root>/digests.jsonl`, so that files are not read again by later runs. Several
    processes may add digests at the same time.

    Args:
        root: folder of the cache; created with the first digest.
    """

    def __init__(self, root: Path):
        self._path = Path(root) / "digests.jsonl"
        self._digests: dict[tuple[str, int, int], str] = {}
        for line in self._path.read_bytes().splitlines() if self._path.exists() else ():
            with suppress(ValueError, TypeError):  # an empty line, or one truncated by a kill
                path, size, changed, digest = json.loads(line)
                self._digests[path, size, changed] = digest

    def digest(self, path: Media) -> str:
        """Returns the digest of a file, which is read only if it has changed."""
        state = _state(path)
        if state in self._digests:
            return self._digests[state]
        digest = _digest(path)
        # A file that changes again within a tick of its file system's clock keeps its time.
        if time.time_ns() - state[2] > 2_000_000_000:
            # The newline comes first, so that a truncated line does not affect the next.
            line = b"\n" + json.dumps([*state, digest]).encode()
            folder = self._path.parent
            folder.mkdir(parents=True, exist_ok=True)
            with (
                naming_full_disk(folder, self._path.name, len(line)),
                self._path.open("ab", buffering=0) as file,
            ):
                file.write(line)
            self._digests[state] = digest
        return digest


def content_key(path: Media, memo: DigestMemo | None = None) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files in sorted order.

    Args:
        path: a media file, a member of a tar, or a folder of frames.
        memo: cache of file digests.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: If `path` does not exist, or is an empty folder.
    """
    digest_of = memo.digest if memo else _digest
    if isinstance(path, TarMember):
        return digest_of(path)
    if not path.is_dir():
        require_file(path, "a media file or a folder of frames")
        return digest_of(path)
    files = sorted(file for file in path.iterdir() if file.is_file())
    if not files:
        raise ValueError(f"folder {path} must hold frames; it has no files")
    lines = [os.fsencode(file.name) + b"\0" + digest_of(file).encode() for file in files]
    return hashlib.sha256(b"\n".join(lines)).hexdigest()


def _state(path: Media) -> tuple[str, int, int]:
    if isinstance(path, TarMember):
        return f"{path.tar.path.resolve()}:{path.offset}", path.size, path.tar.changed
    path = path.resolve()
    stat = path.stat()
    return str(path), stat.st_size, stat.st_mtime_ns


def _digest(path: Media) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
