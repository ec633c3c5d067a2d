"""Locks that let one process at a time write to a folder."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path


class FolderInUseError(ValueError):
    """Raised when another process holds the lock of a folder."""


class FolderLock:
    """Context manager that holds the lock of a folder.

    The lock is released when its process ends, in whatever way.

    Args:
        folder: folder to lock; created if necessary.
        what: name of the folder in error messages.
    """

    def __init__(self, folder: Path, what: str = "output"):
        self.path = folder / ".lock"
        self._what = what
        self._file = None

    def __enter__(self) -> "FolderLock":
        """Acquires the lock.

        Raises:
            FolderInUseError: If another process holds it; the message names the process.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = _told(self._file.read())
            self.forget()
            raise FolderInUseError(
                f"{self._what} ({self.path.parent}) is in use by {holder}; wait for it, or give"
                " another one"
            ) from error
        self._file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
        json.dump(holder, self._file)
        self._file.flush()
        return self

    def __exit__(self, *_) -> None:
        """Releases the lock, even if a forked process has its file open."""
        self._file.truncate(0)
        fcntl.flock(self._file, fcntl.LOCK_UN)
        self.forget()

    def forget(self) -> None:
        """Closes the file; the lock stays with the process that this one was forked from."""
        if self._file:
            self._file.close()
        self._file = None

    def wait(self) -> None:
        """Waits until no other process holds the lock."""
        if self.path.exists():
            with self.path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)


def _told(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['process']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
