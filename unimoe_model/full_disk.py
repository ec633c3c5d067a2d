"""The error of a full disk says what was needed and what is free."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming_full_disk(
    folder: Path, what: str, needed: int, left: str = "what was flushed before is whole"
) -> Iterator[None]:
    """Makes an OSError that says so of what a full disk raises in the block.

    Args:
        folder: on the disk; may not exist yet.
        what: what is written.
        needed: its bytes.
        left: what the user still has.
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
    """Whether a full disk is behind an error, which torch wraps."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if failures := getattr(error, "failures", None):
            return any(_is_full_disk(inner) for inner, _ in failures.values())
        error = error.__cause__ or error.__context__
    return False
