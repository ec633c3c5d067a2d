"""Frames of the videos that FFmpeg reads, through PyAV."""

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
    """Decodes a video once to count its frames, for containers lie about it, and once to keep some.

    Of several streams FFmpeg's choice is taken, which passes over cover pictures. Frames are turned
    as their display matrix says, transparent ones put on white.

    Args:
        source: path, or a file that can be rewound.
        pick: gives the ascending indices of the frames wanted, of the number that there are.
        name: what errors call it.

    Returns:
        `[H, W, 3]` uint8, RGB, for each index.

    Raises:
        ValueError: If there are no frames, or the rotation is no quarter turn.
        ModuleNotFoundError: PyAV is not installed.
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

    It takes column p and row q of a pixel to a p + c q and b p + d q.
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
