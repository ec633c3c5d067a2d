"""Errors of full disks that state the bytes required and the bytes free."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming_full_disk(
    folder: Path, what: str, needed: int, left: str = "what was flushed before is whole"
) -> Iterator[None]:
    """Converts errors that a full disk causes in the block to an OSError that says so.

    Args:
        folder: folder on the disk; need not exist.
        what: what is being written.
        needed: its size in bytes.
        left: state of what was written before.
    """
    try:
        yield
    # CheckpointException of torch derives from BaseException.
    except BaseException as error:
        if not _is_full_disk(error):
            raise
        there = next(path for path in (folder, *folder.parents) if path.exists())
        raise OSError(
            errno.ENOSPC,
            f"disk of {folder} is full: {what} needs {needed} bytes and"
            f" {shutil.disk_usage(there).free} are free; {left}",
        ) from error


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that it wraps, is that of a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if failures := getattr(error, "failures", None):
            return any(_is_full_disk(inner) for inner, _ in failures.values())
        error = error.__cause__ or error.__context__
    return False
