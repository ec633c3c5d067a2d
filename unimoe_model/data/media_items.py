"""Media as users hand them over, files or arrays, in the one form that encoders take."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def as_picture(item, name: str) -> Tensor:
    """A picture as `[H, W, 3]` uint8.

    Args:
        item: path of a file, a Pillow image, or uint8 `[H, W, 3]`.
        name: what errors call it.

    Raises:
        ValueError: if it is neither, or cannot be read.
    """
    if isinstance(item, str | Path):
        from unimoe_model.data.media_io import load_image

        return load_image(item)
    return _pixels(np.array(item.convert("RGB")) if hasattr(item, "convert") else item, name, 3)


def as_video(item, num_frames: int, name: str, seed: int | None = None) -> Tensor:
    """A video as `[num_frames, H, W, 3]` uint8.

    Args:
        item: path of a file or of a folder of pictures, a list of pictures of one size, or uint8
            `[frames, H, W, 3]` with at least one frame.
        num_frames: how many frames are chosen; see `pick_frames`.
        name: what errors call it.
        seed: None chooses evenly, a number at random.

    Raises:
        ValueError: if it is neither, or cannot be read.
    """
    from unimoe_model.data.media_io import load_video, pick_frames

    if isinstance(item, str | Path):
        return load_video(item, num_frames, seed)
    if isinstance(item, list | tuple):
        pictures = [as_picture(picture, name) for picture in item]
        sizes = {tuple(picture.shape) for picture in pictures}
        if len(sizes) != 1:
            raise ValueError(f"{name} (pictures of {sorted(sizes)}) must be of one size")
        item = torch.stack(pictures)
    frames = _pixels(item, name, 4)
    if frames.shape[0] == 0:
        raise ValueError(f"{name} (shape {list(frames.shape)}) must have at least one frame")
    return frames[pick_frames(frames.shape[0], num_frames, seed)]


def as_recording(item, sample_rate: int, name: str) -> NDArray[np.float32]:
    """A recording as `[samples]` float32 at `sample_rate`.

    Args:
        item: path of a file; `[samples]` at `sample_rate`; or a pair of `[samples]` and its rate.
        sample_rate: samples a second of the result.
        name: what errors call it.

    Raises:
        ValueError: if it is none of these, empty, or not finite.
    """
    from unimoe_model.data.audio_io import load_wav, resample

    if isinstance(item, str | Path):
        return load_wav(item, sample_rate)
    rate = sample_rate
    if isinstance(item, tuple):
        item, rate = item
    samples = np.asarray(item, dtype=np.float32)
    if samples.ndim != 1 or samples.size == 0 or not np.isfinite(samples).all():
        raise ValueError(
            f"{name} clip (shape {list(samples.shape)}) must be finite samples [n], n > 0"
        )
    return resample(samples, rate, sample_rate)


def _pixels(item: Tensor | np.ndarray | Sequence, name: str, ndim: int) -> Tensor:
    if isinstance(item, np.ndarray) and not item.flags.writeable:
        item = item.copy()  # as Pillow gives it; torch warns of sharing such memory
    tensor = torch.as_tensor(item)
    if tensor.dtype != torch.uint8 or tensor.dim() != ndim or tensor.shape[-1] != 3:
        raise ValueError(
            f"{name} ({tensor.dtype}, shape {list(tensor.shape)}) must be uint8 with"
            f" {ndim} dimensions, the last of size 3"
        )
    return tensor
