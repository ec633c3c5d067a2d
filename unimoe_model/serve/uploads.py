"""Files uploaded on the page: their folder and their deletion."""

import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from unimoe_model.serve.limits import Limits
from unimoe_model.serve.security import error_body, send_error

UNSENT_SECONDS = 600
"""Seconds that an uploaded file is kept without being sent."""


class Uploads:
    """A temporary folder for the files that Gradio writes; it is deleted when the server ends."""

    def __init__(self):
        # Python deletes it at exit if `close` is not called.
        self._kept = tempfile.TemporaryDirectory(prefix="unimoe-serve-", ignore_cleanup_errors=True)
        self.folder = Path(self._kept.name).resolve()

    def make_default(self) -> None:
        """Makes Gradio write there; must be called before any of its components is created."""
        os.environ["GRADIO_TEMP_DIR"] = str(self.folder)

    def place(self) -> Path:
        """Creates a folder for one file."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def own(self, name: str) -> Path:
        """Returns the path of an uploaded file.

        Raises:
            ValueError: If the file does not exist or is not in this folder.
        """
        path = Path(name).resolve()
        if not path.is_relative_to(self.folder) or not path.is_file():
            raise ValueError("the file must be uploaded first, or once more")
        return path

    def delete(self, paths: Iterable[Path]) -> None:
        """Deletes files, and their folders if these are then empty."""
        for path in paths:
            path.unlink(missing_ok=True)
            if path.parent != self.folder:
                try:
                    path.parent.rmdir()
                except OSError:
                    continue

    def held(self) -> int:
        """Returns the bytes of all files."""
        return sum(path.stat().st_size for path in self._files())

    def expire(self, seconds: float) -> None:
        """Deletes files that were uploaded more than `seconds` ago and not sent."""
        oldest = time.time() - seconds
        self.delete([path for path in self._files() if path.stat().st_mtime < oldest])

    def _files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]

    def limited(self, app, limits: Limits):
        """Wraps an ASGI application to refuse uploads while too many bytes wait to be sent."""
        underway = 0

        async def guarded(scope, receive, send):
            nonlocal underway
            if scope["type"] != "http" or not scope["path"].endswith("/upload"):
                await app(scope, receive, send)
                return
            self.expire(UNSENT_SECONDS)
            if self.held() + (underway + 1) * limits.body_bytes > limits.uploads_bytes:
                message = "too many files wait to be sent; try again in a minute"
                refusal = error_body(message, "server_error")
                await send_error(send, 503, refusal, [(b"retry-after", b"60")])
                return
            underway += 1
            try:
                await app(scope, receive, send)
            finally:
                underway -= 1

        return guarded

    def close(self) -> None:
        """Deletes the folder."""
        self._kept.cleanup()
