"""One process at a time writes a folder."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path


class FolderInUseError(ValueError):
    """Another process has the lock of a folder."""


class FolderLock:
    """A context in which no other process has the lock of a folder.

    The lock ends with its process, however that ends, so that one of a dead process is free.

    Args:
        folder: made if it is not there.
        what: what errors call it.
    """

    def __init__(self, folder: Path, what: str = "output"):
        self.path = folder / ".lock"
        self._what = what
        self._file = None

    def __enter__(self) -> "FolderLock":
        """Takes the lock.

        Raises:
            FolderInUseError: If another process has it, naming it.
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
        """Gives the lock back, to a forked process too that has its file open."""
        self._file.truncate(0)
        fcntl.flock(self._file, fcntl.LOCK_UN)
        self.forget()

    def forget(self) -> None:
        """Closes the file; the lock stays with the process that this one was forked from."""
        if self._file:
            self._file.close()
        self._file = None

    def wait(self) -> None:
        """Waits until no other process has the lock."""
        if self.path.exists():
            with self.path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)


def _told(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['process']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
