"""Decoding of video files with FFmpeg, through PyAV."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unimoe_model.data.pictures import on_white, turned
from unimoe_model.extras import needed_by


def stream_frames(
    source: Path | BinaryIO, pick: Callable[[int], Sequence[int]], name: str
) -> list[Tensor]:
    """Decodes selected frames of a video.

    The video is decoded twice: once to count its frames, because containers may state a wrong
    number, and once to keep the selected ones. Of several streams FFmpeg's choice is used, which
    skips cover pictures. The display matrix is applied, and transparency is composited on white.

    Args:
        source: path, or a seekable file.
        pick: returns the ascending indices of the frames to keep, given the number of frames.
        name: name of the video in error messages.

    Returns:
        A tensor `[H, W, 3]` uint8, RGB, for each index.

    Raises:
        ValueError: If there are no frames, or the rotation is not a multiple of 90 degrees.
        ModuleNotFoundError: If PyAV is not installed.
    """
    with needed_by(f"video file {name}"):
        import av

    def decoded():
        if not isinstance(source, Path):
            source.seek(0)
        with av.open(source) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise ValueError("it has no pictures")
            stream.thread_type = "AUTO"
            yield from container.decode(stream)

    available = sum(1 for _ in decoded())
    if available == 0:
        raise ValueError("it has no frames")
    picked = pick(available)
    wanted, last = set(picked), picked[-1]
    frames = {}
    for index, frame in enumerate(decoded()):
        if index in wanted:
            frames[index] = torch.from_numpy(turned(_pixels(frame), *_turn(frame)))
        if index == last:
            break
    return [frames[index] for index in picked]


def _pixels(frame) -> NDArray[np.uint8]:
    if any(component.is_alpha for component in frame.format.components):
        return on_white(frame.to_ndarray(format="rgba"))
    return frame.to_ndarray(format="rgb24")


def _turn(frame) -> tuple[bool, bool, bool]:
    """Arguments of `turned` for the display matrix of a frame.

    The matrix maps column p and row q of a pixel to a p + c q and b p + d q.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False, False, False
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), np.int32).tolist()
    if b == c == 0 and a and d:
        return False, d < 0, a < 0
    if a == d == 0 and b and c:
        return True, b < 0, c < 0
    raise ValueError(f"its rotation ({frame.rotation} degrees) must be a multiple of 90")
