"""Decoding of clients' media in a process that can be killed."""

import json
import multiprocessing
import threading
from pathlib import Path

import numpy as np

from unimoe_model.processing import UniMoEProcessor
from unimoe_model.serve.limits import Limits


class MediaDecoder:
    """A process that decodes one item at a time.

    Args:
        processor: processor of the model.
        limits: limits of size, duration, time and memory.
        frame_seed: seed of random video frames; None for evenly spaced frames.
    """

    def __init__(self, processor: UniMoEProcessor, limits: Limits, frame_seed: int | None = None):
        self._processor = processor
        self._limits = limits
        self._frame_seed = frame_seed
        self._lock = threading.Lock()
        self._process = None
        self._connection = None
        self._is_closed = False

    def start(self) -> None:
        """Starts the process if it is not running. The first `read` waits until it is ready."""
        if self._process is not None and self._process.is_alive():
            return
        from unimoe_model.serve.decoding_worker import work

        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, self._limits), daemon=True)
        self._process.start()
        theirs.close()
        self._is_ready = False

    def close(self) -> None:
        """Kills the process permanently, also while it decodes; callable from any thread."""
        self._is_closed = True
        process = self._process
        if process is not None:
            process.kill()
        with self._lock:  # the current decoding has failed by now
            self._kill()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None

    def read(self, kind: str, content: bytes | Path) -> np.ndarray:
        """Decodes a file.

        Args:
            kind: media kind.
            content: path or bytes of the file.

        Returns:
            Pixels `[H, W, 3]` or `[frames, H, W, 3]` uint8, or `[samples]` float32 at the rate of
            the kind's encoder.

        Raises:
            ValueError: If the file is not of this kind, too large, or takes too long to decode.
        """
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        if size > self._limits.body_bytes:
            raise ValueError(
                f"{kind} ({size:,} bytes) must have at most {self._limits.body_bytes:,} bytes"
            )
        request = {
            "kind": kind,
            "path": None if isinstance(content, bytes) else str(content),
            "sample_rate": 0,
            "num_frames": self._processor.video_num_frames,
            "frame_seed": self._frame_seed,
            "padded": self._processor.image_aspect_ratio == "pad",
        }
        if kind in ("speech", "audio"):
            request["sample_rate"] = self._processor.sample_rate(kind)
        with self._lock:
            return self._ask(kind, request, content)

    def _ask(self, kind: str, request: dict, content: bytes | Path) -> np.ndarray:
        if self._is_closed:
            raise ValueError(f"{kind} is not decoded: the server is ending")
        self.start()
        try:
            if not self._is_ready:
                self._connection.recv_bytes()
                self._is_ready = True
            self._connection.send_bytes(json.dumps(request).encode())
            if isinstance(content, bytes):
                self._connection.send_bytes(content)
            if not self._connection.poll(self._limits.decoding_seconds):
                self._kill()
                raise ValueError(
                    f"{kind} must be decoded within {self._limits.decoding_seconds:g} s; it took"
                    " longer"
                )
            found = json.loads(self._connection.recv_bytes())
            if "error" in found:
                raise ValueError(found["error"])
            pixels_or_samples = self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            self._kill()
            raise ValueError(f"{kind} could not be decoded: its decoder ended") from error
        array = np.frombuffer(pixels_or_samples, found["dtype"]).reshape(found["shape"])
        return array.copy()  # torch requires writable memory
