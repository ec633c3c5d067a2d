"""Files and folders that are replaced whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Replaces a file whole or not at all: the block writes under another name, which is renamed.

    A kill, an error in the block or a power cut leaves the file as it was: what was written is on
    the disk before the rename. An error leaves nothing else, a kill perhaps the file under the
    other name. That name is in the same folder, hidden, and another one for each writer; of several
    that write the same file the last one counts. It ends in the suffix of `path`, which some
    writers choose a format by.

    The file gets the mode that the umask gives, whatever the writer chose (safetensors makes files
    readable by their owner alone).

    Example:
        >>> folder = tempfile.mkdtemp()
        >>> with atomic_write(f"{folder}/loss.json") as partial:
        ...     written = partial.write_text("[0.5]")
        >>> sorted(os.listdir(folder))
        ['loss.json']

    Args:
        path: The file. A symbolic link is replaced, not followed.

    Yields:
        The name to write under; an empty file is there already.

    Raises:
        FileNotFoundError: If the folder of `path` does not exist.
        IsADirectoryError: If `path` is a folder.
        OSError: If the file cannot be written; it is as it was.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path ({path}) must be in a folder that exists: {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"path ({path}) must be a file, and is a folder")
    partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    partial.touch(exist_ok=False)
    try:
        mode = partial.stat().st_mode & 0o777
        yield partial
        _sync(partial)
        partial.chmod(mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def replace_folder(folder: str | Path, fresh: str | Path, *, overwrite: bool = True) -> None:
    """Gives a new folder the name of another one, which it replaces whole or not at all.

    After a kill or a power cut in between, `recover_folder` makes `folder` the old one or the new
    one: what is in the new one is on the disk before it gets the name. On the way the old one has
    the name `<folder>.old`; what else had it is removed.

    Example:
        >>> run = tempfile.mkdtemp()
        >>> os.mkdir(f"{run}/checkpoint.new")
        >>> replace_folder(f"{run}/checkpoint", f"{run}/checkpoint.new")
        >>> os.listdir(run)
        ['checkpoint']

    Args:
        folder: Where the new folder goes.
        fresh: The new folder, on the same file system.
        overwrite: Whether what is at `folder` is replaced. If not, nothing may be there, and
            `<folder>.old` is left alone.

    Raises:
        NotADirectoryError: If `fresh` is no folder, or what is at `folder`; nothing is changed.
        OSError: If `overwrite` is false and a folder with files is at `folder`; nothing is changed.
    """
    folder, fresh = Path(folder), Path(fresh)
    if not fresh.is_dir():
        raise NotADirectoryError(f"fresh ({fresh}) must be a folder")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder ({folder}) must be a folder, and is a file")
    for path in fresh.rglob("*"):
        if path.is_file():
            _sync(path)
    if not overwrite:
        os.rename(fresh, folder)
        return
    recover_folder(folder)
    old = _old(folder)
    if folder.exists():
        os.rename(folder, old)
    os.rename(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: str | Path) -> None:
    """Undoes or completes a `replace_folder` that was killed; changes nothing otherwise.

    Args:
        folder: As in `replace_folder`. Afterwards it is the old one or the new one, and
            `<folder>.old` is gone.
    """
    folder = Path(folder)
    old = _old(folder)
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    shutil.rmtree(old, ignore_errors=True)


def _old(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.old")


def _sync(path: Path) -> None:
    """Waits until the content of a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
