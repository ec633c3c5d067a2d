"""Cache of frozen features of media files, in a few large files.

A store is a folder. `settings.json` records what its features depend on, `features-00000.bin` and
so on hold the numbers, `index.jsonl` has one line per item, and `.lock` excludes a second writer.
The bytes of an item are synced to disk before its line of the index is written, so that a kill at
any moment leaves only complete items.
"""

import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unimoe_kernels import atomic_write
from unimoe_model.folder_lock import FolderLock
from unimoe_model.full_disk import naming_full_disk


class _Item(NamedTuple):
    """A line of the index; `crc32` covers key, shapes and bytes."""

    key: str
    file: int
    offset: int
    shapes: list[list[int]]
    crc32: int


class FeatureStore:
    """Features by key, in the folder `<root>/<encoder>-<hash of settings and dtype>`.

    Any number of processes may read. The first `write` makes a process the writer until `close`;
    a forked or unpickled copy starts as a reader. The store is a context manager that closes on
    exit.

    Args:
        root: folder of all stores.
        settings: JSON values of everything, except for the media file, that the features depend
            on. The text of `"encoder"` is part of the folder's name.
        dtype: dtype of the numbers on disk, float16 or bfloat16.
        file_bytes: maximum size of a data file in bytes; a new file is started beyond it.

    Attributes:
        folder: folder of this store, created by the first `write`.
        dtype: dtype of the numbers on disk.

    Raises:
        ValueError: If `dtype` is not supported, `settings` are not JSON values or lack
            `"encoder"`, or an existing `settings.json` differs.
    """

    def __init__(
        self,
        root: Path,
        settings: Mapping[str, Any],
        dtype: torch.dtype = torch.float16,
        file_bytes: int = 2 << 30,
    ):
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"dtype ({dtype}) must be torch.float16 or torch.bfloat16")
        slug = re.sub(r"[^\w.]+", "-", str(settings.get("encoder") or ""), flags=re.ASCII)
        if not slug:
            raise ValueError(f"settings ({dict(settings)}) must have a text 'encoder'")
        name = str(dtype).removeprefix("torch.")
        described = {"format": 1, "dtype": name, "settings": dict(settings)}
        try:
            text = json.dumps(described, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"settings ({dict(settings)}) must be JSON values: {error}") from error
        self._described = json.loads(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        self.folder = Path(root) / f"{slug[:80]}-{digest[:12]}"
        self.dtype = dtype
        self._file_bytes = file_bytes
        self._arguments = (root, dict(settings), dtype, file_bytes)
        self._forget()
        self._lock = FolderLock(self.folder, "feature store")
        self._writer = self._index = self._data = None
        self._pending: list[_Item] = []
        self.refresh()

    def __reduce__(self):
        return type(self), self._arguments

    def __enter__(self) -> "FeatureStore":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __contains__(self, key: str) -> bool:
        return key in self._items

    def __len__(self) -> int:
        return len(self._items)

    def read(self, key: str) -> list[Tensor]:
        """Returns the pieces of an item as float32 copies, in the shapes that were written.

        Raises:
            KeyError: If there is no item `key`.
            ValueError: If the checksum of its bytes is wrong.
        """
        if key not in self._items:
            raise KeyError(f"key ({key}) must be one of the {len(self)} in {self.folder}")
        item, nothing = self._items[key], np.empty(0, np.uint8)
        path, end = self._path(item.file), self._end(item)
        mapped = self._maps.get(item.file, nothing)
        if len(mapped) < end:
            mapped = np.memmap(path, np.uint8, "r") if path.stat().st_size else nothing
            self._maps[item.file] = mapped
        content = np.array(mapped[item.offset : end])
        if _checksum(key, item.shapes, content) != item.crc32:
            raise ValueError(
                f"{path} is damaged in item {key}; delete {self.folder} to compute it anew"
            )
        # Words, because torch cannot view the bytes of an empty array as another dtype.
        numbers = torch.from_numpy(content.view(np.int16)).view(self.dtype)
        parts = numbers.split([math.prod(shape) for shape in item.shapes])
        return [p.float().reshape(s) for p, s in zip(parts, item.shapes, strict=True)]

    def write(self, key: str, pieces: Sequence[Tensor]) -> None:
        """Appends an item, visible to this process immediately and durable after `flush`.

        Args:
            key: key of the item; an existing item is left unchanged.
            pieces: at least one floating-point tensor, of any shapes.

        Raises:
            ValueError: If `pieces` are empty or not floating point, a piece is not finite in the
                store's dtype, or another process is the writer.
            OSError: If the disk is full; earlier items stay intact.
        """
        if key in self:
            return
        content, shapes = self._packed(key, pieces)
        with naming_full_disk(self.folder, f"item {key}", len(content)):
            self._become_writer()
            if key in self:
                return
            if self._tail and self._tail + len(content) > self._file_bytes:
                self.flush()
                self._open_data(self._number + 1)
            try:
                _write_all(self._data, content, self._tail)
            except OSError:
                self._data.truncate(self._tail)
                raise
        crc32 = _checksum(key, shapes, content)
        item = _Item(key, self._number, self._tail, shapes, crc32)
        # In this order, an interrupt in between loses at most this item.
        self._tail += len(content)
        self._pending.append(item)
        self._items[key] = item

    def open(self) -> None:
        """Makes this process the writer, as the first `write` does, and reads flushed items.

        Raises:
            FolderInUseError: If another process is the writer.
            OSError: If the disk is full.
        """
        with naming_full_disk(self.folder, "settings.json", 4096):
            self._become_writer()

    def flush(self) -> None:
        """Syncs written items to disk and makes them visible to other processes.

        Raises:
            OSError: If syncing fails; the store is then in the state of the previous `flush`.
        """
        if not self._pending or self._writer != os.getpid():
            return
        lines = "".join(json.dumps(item._asdict()) + "\n" for item in self._pending).encode()
        try:
            with naming_full_disk(self.folder, "index.jsonl", len(lines)):
                os.fsync(self._data)
                _write_all(self._index, lines, self._position)
                os.fsync(self._index)
        except OSError:
            # A second fsync would succeed without having saved what this one could not.
            for item in self._pending:
                self._items.pop(item.key, None)
            self._tail = self._pending[0].offset
            self._pending = []
            self._index.truncate(self._position)
            self._data.truncate(self._tail)
            raise
        self._position += len(lines)
        self._pending = []

    def refresh(self) -> None:
        """Reads items that other processes have flushed.

        Raises:
            ValueError: If `settings.json` differs from this store's settings.
        """
        self._check_settings()
        try:
            with (self.folder / "index.jsonl").open("rb") as file:
                file.seek(self._position)
                content = file.read()
        except FileNotFoundError:
            return
        size_of = cache(self._file_size)
        whole = content.rfind(b"\n") + 1
        for line in content[:whole].splitlines():
            # After a power failure, lines that were not synced may contain anything.
            with suppress(ValueError, TypeError):
                item = _Item(**json.loads(line))
                end = self._end(item)
                self._reach[item.file] = max(end, self._reach.get(item.file, 0))
                if end <= size_of(item.file):
                    self._items[item.key] = item
        self._position += whole

    def wait(self) -> None:
        """Waits until no other process is the writer, and reads flushed items."""
        self._lock.wait()
        self.refresh()

    def close(self) -> None:
        """Flushes and releases the lock; later calls reopen the store."""
        try:
            self.flush()
        finally:
            if self._writer == os.getpid():
                self._lock.__exit__()
            self._release()
            self._maps = {}

    def _path(self, number: int) -> Path:
        return self.folder / f"features-{number:05d}.bin"

    def _file_size(self, number: int) -> int:
        path = self._path(number)
        return path.stat().st_size if path.exists() else 0

    def _end(self, item: _Item) -> int:
        return item.offset + needed_bytes(item.shapes, self.dtype)

    def _forget(self) -> None:
        self._items: dict[str, _Item] = {}
        self._maps: dict[int, np.ndarray] = {}
        self._position = 0  # in the index, past its last complete line
        self._reach: dict[int, int] = {}  # file -> end of its last item in the index

    def _check_settings(self) -> None:
        path = self.folder / "settings.json"
        try:
            found = json.loads(path.read_bytes())
        except FileNotFoundError:
            return
        except ValueError as error:
            found = f"unreadable: {error}"
        if found != self._described:
            raise ValueError(
                f"{path} ({found}) must be {self._described}; delete {self.folder} to compute its"
                " features anew"
            )

    def _packed(self, key: str, pieces: Sequence[Tensor]) -> tuple[np.ndarray, list[list[int]]]:
        """Bytes and shapes of the pieces."""
        if isinstance(pieces, Tensor) or not pieces:
            kind = type(pieces).__name__
            raise ValueError(f"pieces of item {key} ({kind}) must be a list of tensors, not empty")
        parts = []
        for piece in pieces:
            if not piece.is_floating_point():
                raise ValueError(f"pieces of item {key} ({piece.dtype}) must be floats")
            parts.append(piece.detach().to("cpu", self.dtype).flatten())
            finite = parts[-1].isfinite()
            if not finite.all():
                value = piece.detach().cpu().flatten()[~finite][0].item()
                raise ValueError(f"pieces of item {key} ({value}) must be finite in {self.dtype}")
        return torch.cat(parts).view(torch.uint8).numpy(), [list(piece.shape) for piece in pieces]

    def _become_writer(self) -> None:
        if self._writer == os.getpid():
            return
        self._release()  # files inherited through a fork
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.__enter__()
            self._forget()
            self.refresh()
            settings = self.folder / "settings.json"
            if not settings.exists():
                with atomic_write(settings) as partial:
                    partial.write_text(json.dumps(self._described, indent=2) + "\n")
            self._index = _open(self.folder / "index.jsonl", self._position)
            number = max(self._reach, default=0)
            # A line that points past the end of its file would become valid if the file grew.
            cut = self._reach.get(number, 0) > self._file_size(number)
            self._open_data(number + cut)
        except BaseException:
            self._release()
            raise
        self._writer = os.getpid()

    def _open_data(self, number: int) -> None:
        tail = self._reach.get(number, 0)
        data = _open(self._path(number), tail)
        if self._data:
            self._data.close()
        self._data, self._number, self._tail = data, number, tail

    def _release(self) -> None:
        for file in (self._data, self._index):
            if file:
                file.close()
        self._lock.forget()
        self._writer = self._index = self._data = None
        self._pending = []


def needed_bytes(shapes: Iterable[Sequence[int]], dtype: torch.dtype) -> int:
    """Size on disk, in bytes, of pieces with these shapes."""
    return dtype.itemsize * sum(math.prod(shape) for shape in shapes)


def _checksum(key: str, shapes: list[list[int]], content: np.ndarray) -> int:
    return zlib.crc32(content, zlib.crc32(json.dumps([key, shapes]).encode()))


def _open(path: Path, size: int) -> FileIO:
    """Opens a file for writing, creating it if necessary, and truncates it to `size` bytes."""
    path.touch()
    file = path.open("r+b", buffering=0)
    file.truncate(size)
    return file


def _write_all(file: FileIO, content: bytes | np.ndarray, offset: int) -> None:
    rest = memoryview(content)
    while rest:
        count = os.pwrite(file.fileno(), rest, offset)
        rest, offset = rest[count:], offset + count
