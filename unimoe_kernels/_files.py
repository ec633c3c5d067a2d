"""Atomic replacement of files and folders."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Replaces a file atomically: the block writes to a temporary file, which is then renamed.

    If the process is killed, the block raises or power fails, the file keeps its old content: the
    new content is flushed to disk before the rename. After an error the temporary file is removed;
    after a kill it may remain. It is a hidden file in the same folder with a name unique to the
    writer; if several processes write the same path, the last one wins. The temporary name keeps
    the suffix of `path`, from which some writers infer the format.

    The file's mode follows the umask, whatever the writer sets (safetensors creates files that only
    their owner can read).

    Example:
        >>> folder = tempfile.mkdtemp()
        >>> with atomic_write(f"{folder}/loss.json") as partial:
        ...     written = partial.write_text("[0.5]")
        >>> sorted(os.listdir(folder))
        ['loss.json']

    Args:
        path: The file. A symbolic link is replaced, not followed.

    Yields:
        The path of the temporary file to write, which exists and is empty.

    Raises:
        FileNotFoundError: If the folder of `path` does not exist.
        IsADirectoryError: If `path` is a folder.
        OSError: If the file cannot be written; it keeps its old content.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path ({path}) must be in an existing folder: {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"path ({path}) must be a file, but is a folder")
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
    """Replaces a folder with a new one as a whole.

    If the process is killed or power fails in between, `recover_folder` restores either the old
    folder or the new one: the new folder's files are flushed to disk before it is renamed. In the
    meantime the old folder is named `<folder>.old`; anything else of that name is removed.

    Example:
        >>> run = tempfile.mkdtemp()
        >>> os.mkdir(f"{run}/checkpoint.new")
        >>> replace_folder(f"{run}/checkpoint", f"{run}/checkpoint.new")
        >>> os.listdir(run)
        ['checkpoint']

    Args:
        folder: Where the new folder goes.
        fresh: The new folder, on the same file system.
        overwrite: Whether an existing `folder` is replaced. If not, `folder` must not exist or
            must be empty, and `<folder>.old` is left alone.

    Raises:
        NotADirectoryError: If `fresh` is not a folder, or `folder` exists and is not a folder.
            Nothing is changed.
        OSError: If `overwrite` is false and `folder` is not empty. Nothing is changed.
    """
    folder, fresh = Path(folder), Path(fresh)
    if not fresh.is_dir():
        raise NotADirectoryError(f"fresh ({fresh}) must be a folder")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder ({folder}) must be a folder, but is a file")
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
    """Undoes or completes an interrupted `replace_folder`; changes nothing otherwise.

    Args:
        folder: As in `replace_folder`. Afterwards it is either the old or the new folder, and
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
    """Flushes a file to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
