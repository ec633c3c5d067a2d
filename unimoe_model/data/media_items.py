"""Conversion of media, given as files or arrays, to the form that encoders accept."""

from collections.abc import Collection, Mapping, Sequence
from importlib import import_module

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unimoe_model.data.sources import as_source
from unimoe_model.extras import needed_by


def require_readers(kinds: Collection[str]) -> None:
    """Imports the packages that read files of these media kinds.

    Raises:
        ModuleNotFoundError: If one is not installed.
    """
    if {"image", "video"} & set(kinds):
        import_module("unimoe_model.data.media_io")
    if {"speech", "audio"} & set(kinds):
        with needed_by("reading sound"):
            import_module("soundfile")
            import_module("scipy.signal")


def as_picture(item, name: str) -> Tensor:
    """Converts a picture to `[H, W, 3]` uint8.

    Args:
        item: a file (see `as_source`), a Pillow image, or uint8 `[H, W, 3]`. Of files and Pillow
            images, the EXIF orientation is applied and transparency is composited on white.
        name: name of the item in error messages.

    Raises:
        ValueError: If the item has another form or cannot be read.
    """
    if (source := as_source(item)) is not None:
        from unimoe_model.data.media_io import load_image

        return load_image(source)
    if _is_pillow(item):
        from unimoe_model.data.pictures import decode_picture

        return _read_pillow(item, name, decode_picture)
    return _pixels(item, name, 3)


def as_video(item, num_frames: int, name: str, seed: int | None = None) -> Tensor:
    """Converts a video to `[num_frames, H, W, 3]` uint8.

    Args:
        item: a file or a folder of pictures (see `load_video`), an animated Pillow image,
            a list of pictures of one size, or uint8 `[frames, H, W, 3]` with at least one frame.
        num_frames: number of frames to select; see `pick_frames`.
        name: name of the item in error messages.
        seed: seed for drawing frames at random; None spaces them evenly.

    Raises:
        ValueError: If the item has another form or cannot be read.
    """
    from unimoe_model.data.media_io import animation_frames, load_video, pick_frames

    if (source := as_source(item)) is not None:
        return load_video(source, num_frames, seed)
    if _is_pillow(item):
        return _read_pillow(
            item, name, lambda image: torch.stack(animation_frames(image, num_frames, seed))
        )
    if isinstance(item, list | tuple):
        pictures = [as_picture(picture, name) for picture in item]
        sizes = {tuple(picture.shape) for picture in pictures}
        if len(sizes) != 1:
            raise ValueError(f"{name} (pictures of {sorted(sizes)}) must be of one size")
        item = torch.stack(pictures)
    frames = _pixels(item, name, 4)
    return frames[pick_frames(frames.shape[0], num_frames, seed)]


def as_recording(item, sample_rate: int, name: str) -> NDArray[np.float32]:
    """Converts a recording to `[samples]` float32 at `sample_rate`, full scale at 1.

    Args:
        item: a file (see `as_source`); samples `[n]` at `sample_rate`; or samples with their own
            rate, as a pair `(samples, rate)` or as the `{"array", "sampling_rate"}` of Hugging Face
            datasets. Samples are floats, or an array or tensor of integers of any width, which are
            scaled.
        sample_rate: sampling rate of the result in Hz.
        name: name of the item in error messages.

    Raises:
        ValueError: If the item has another form, or samples are empty or not finite.
    """
    from unimoe_model.data.audio_io import full_scale, load_wav, resample, whole_rate

    if isinstance(item, Mapping) and "array" in item:
        if "sampling_rate" not in item:
            raise ValueError(f"{name} clip (keys {list(item)}) must have a sampling_rate")
        item = (item["array"], item["sampling_rate"])
    if (source := as_source(item)) is not None:
        return load_wav(source, sample_rate)
    rate = sample_rate
    if isinstance(item, tuple):
        if len(item) != 2:
            raise ValueError(f"{name} clip (tuple of {len(item)}) must be a pair (samples, rate)")
        item, rate = item[0], whole_rate(item[1], f"{name} rate")
    array = _array(item, f"{name} clip")
    if isinstance(item, Sequence) and array.dtype.kind in "iu":
        raise ValueError(
            f"{name} clip ({type(item).__name__} of integers) must be floats, or an array whose"
            " dtype gives the full scale"
        )
    samples = full_scale(array, f"{name} clip")
    if samples.ndim != 1 or samples.size == 0 or not np.isfinite(samples).all():
        raise ValueError(
            f"{name} clip (shape {list(samples.shape)}) must be finite samples [n], n > 0"
        )
    return resample(samples, rate, sample_rate)


def _array(item, name: str) -> NDArray:
    try:
        if not isinstance(item, Tensor):
            return np.asarray(item)
        item = item.detach().cpu()
        # NumPy has no bfloat16.
        return (item.float() if item.is_floating_point() else item).numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} ({type(item).__name__}) must be samples [n]: {error}") from error


def _is_pillow(item) -> bool:
    return hasattr(item, "getexif") and hasattr(item, "convert")


def _read_pillow(image, name: str, read) -> Tensor:
    try:
        return read(image)
    # A lazy image reads its file only here; see load_image.
    except Exception as error:
        raise ValueError(f"{name} (Pillow image, mode {image.mode}): {error}") from error


def _pixels(item: Tensor | np.ndarray | Sequence, name: str, ndim: int) -> Tensor:
    if isinstance(item, np.ndarray) and (
        not item.flags.writeable or any(stride < 0 for stride in item.strides)
    ):
        item = item.copy()  # torch warns of read-only memory and refuses mirrored one
    try:
        tensor = torch.as_tensor(item).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} ({type(item).__name__}) must be a file, a Pillow image or uint8 pixels with"
            f" {ndim} dimensions: {error}"
        ) from error
    if tensor.dtype != torch.uint8 or tensor.dim() != ndim or tensor.shape[-1] != 3:
        raise ValueError(
            f"{name} ({tensor.dtype}, shape {list(tensor.shape)}) must be uint8 with"
            f" {ndim} dimensions, the last of size 3"
        )
    if tensor.numel() == 0:
        what = "frame" if tensor.shape[0] == 0 and ndim == 4 else "pixel"
        raise ValueError(f"{name} (shape {list(tensor.shape)}) must have at least one {what}")
    return tensor
