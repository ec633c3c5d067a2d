"""One run at a time writes a folder."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path

_FILE = ".lock"


class FolderLock:
    """A context in which no other process has the lock of a folder.

    The lock ends with its process, however that ends, so that one of a dead process is free.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._file = None

    def __enter__(self) -> "FolderLock":
        """Takes the lock.

        Raises:
            ValueError: If another process has it, naming it.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = (self._folder / _FILE).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            text = self._file.read()
            self._file.close()
            raise ValueError(
                f"output ({self._folder}) is in use by {_told(text)}; wait for it, or give another"
                " one"
            ) from error
        self._file.seek(0)
        self._file.truncate()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        json.dump(
            {"process": os.getpid(), "host": socket.gethostname(), "since": since}, self._file
        )
        self._file.flush()
        return self

    def __exit__(self, *_) -> None:
        """Gives the lock back."""
        self._file.seek(0)
        self._file.truncate()
        self._file.close()


def _told(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['process']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
