"""Files that the page uploads: where they lie, and that nothing stays of them."""

import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from unimoe_model.serve.limits import Limits
from unimoe_model.serve.security import error_body, send_error

UNSENT_SECONDS = 600
"""How long a file is kept that was uploaded and not sent."""


class Uploads:
    """A folder of its own for what Gradio writes; it is gone when the server ends."""

    def __init__(self):
        # Python deletes it at its end where `close` is not called.
        self._kept = tempfile.TemporaryDirectory(prefix="unimoe-serve-", ignore_cleanup_errors=True)
        self.folder = Path(self._kept.name).resolve()

    def make_default(self) -> None:
        """Gradio, which reads the variable, writes there; before any of its components is made."""
        os.environ["GRADIO_TEMP_DIR"] = str(self.folder)

    def place(self) -> Path:
        """A new folder for one file."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def own(self, name: str) -> Path:
        """A file that was uploaded.

        Raises:
            ValueError: If it lies elsewhere, or there is none.
        """
        path = Path(name).resolve()
        if not path.is_relative_to(self.folder) or not path.is_file():
            raise ValueError("the file must be uploaded first, or once more")
        return path

    def delete(self, paths: Iterable[Path]) -> None:
        """Deletes files, and the folders in which they lie alone."""
        for path in paths:
            path.unlink(missing_ok=True)
            if path.parent != self.folder:
                try:
                    path.parent.rmdir()
                except OSError:
                    continue

    def held(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self._files())

    def expire(self, seconds: float) -> None:
        """Deletes what was uploaded longer ago and never sent."""
        oldest = time.time() - seconds
        self.delete([path for path in self._files() if path.stat().st_mtime < oldest])

    def _files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]

    def limited(self, app, limits: Limits):
        """An ASGI application whose uploads are refused while too many files wait to be sent."""
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
        """Deletes everything."""
        self._kept.cleanup()
