"""The error of a full disk says what was needed and what is free."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming_full_disk(folder: Path, what: str, needed: int) -> Iterator[None]:
    """Names a full disk in the OSError of the block.

    Args:
        folder: on the disk; need not be there yet.
        what: what is written.
        needed: its bytes.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        there = next(path for path in (folder, *folder.parents) if path.exists())
        raise OSError(
            errno.ENOSPC,
            f"disk of {folder} is full: {what} needs {needed} bytes and"
            f" {shutil.disk_usage(there).free} are free; what was flushed before is whole",
        ) from error
