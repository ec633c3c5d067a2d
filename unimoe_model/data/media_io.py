"""Reading of pictures and videos from files."""

import random
import re
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from unimoe_model.data.pictures import decode_picture
from unimoe_model.data.sources import as_source, label, require_file
from unimoe_model.data.video_stream import stream_frames
from unimoe_model.extras import needed_by

with needed_by("reading pictures"):
    from PIL import Image

NUM_FRAMES = 8
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".avif"}
_IMAGE_FORMATS = {"PNG", "JPEG", "MPO", "BMP", "GIF", "WEBP", "TIFF", "AVIF"}


def load_image(source: Any) -> Tensor:
    """Reads a picture, or the first frame of an animated one.

    Args:
        source: a path, or any other form that `as_source` accepts.

    Returns:
        `[H, W, 3]` uint8, RGB; see `decode_picture`.

    Raises:
        ValueError: If the file is missing, damaged or not a picture, or its mode is not supported.
    """
    source = as_source(source)
    require_file(source, "a picture such as PNG or JPEG")
    try:
        with Image.open(source) as image:
            return decode_picture(image)
    # Pillow's decoders raise errors of many kinds on damaged bytes, IndexError among them.
    except Exception as error:
        raise ValueError(
            f"image file {label(source)} must be a whole picture such as PNG or JPEG: {error}"
        ) from error


def load_video(source: Any, num_frames: int = NUM_FRAMES, seed: int | None = None) -> Tensor:
    """Reads a video file, an animated picture, or a folder of pictures.

    Args:
        source: a path, or any other form that `as_source` accepts. Files other than pictures are
            read by FFmpeg, through PyAV. Pictures of a folder are frames in the natural order of
            their names, 2 before 10; hidden files are ignored.
        num_frames: number of frames to return; see `pick_frames`.
        seed: seed for drawing frames at random; None spaces them evenly.

    Returns:
        `[num_frames, H, W, 3]` uint8, RGB.

    Raises:
        ValueError: If the file is missing or damaged, has no pictures, or pictures of different
            sizes.
        ModuleNotFoundError: If the file requires PyAV, which is not installed.
    """
    source = as_source(source)
    if isinstance(source, Path) and source.is_dir():
        files = _frame_files(source)
        frames = [load_image(files[i]) for i in pick_frames(len(files), num_frames, seed)]
    else:
        require_file(source, "a video such as MP4, an animated GIF or a folder of pictures")
        try:
            if _is_picture(source):
                with Image.open(source) as image:
                    frames = animation_frames(image, num_frames, seed)
            else:
                pick = partial(pick_frames, wanted=num_frames, seed=seed)
                frames = stream_frames(source, pick, label(source))
        except ModuleNotFoundError:
            raise
        except Exception as error:
            raise ValueError(
                f"video file {label(source)} must be a whole video, animated GIF or folder of"
                f" pictures: {error}"
            ) from error
    sizes = sorted({(frame.shape[1], frame.shape[0]) for frame in frames})
    if len(sizes) > 1:
        raise ValueError(f"frames of video {label(source)} must have one size, have {sizes}")
    return torch.stack(frames)


def animation_frames(image: Image.Image, num_frames: int, seed: int | None = None) -> list[Tensor]:
    """Returns frames `[H, W, 3]` uint8 of an open picture, which may be animated.

    Frames are selected by `pick_frames`. The default image of an APNG is not a frame.
    """
    covers = int(getattr(image, "default_image", False))
    picked = pick_frames(getattr(image, "n_frames", 1) - covers, num_frames, seed)
    frames = []
    for index in picked:
        image.seek(covers + index)
        frames.append(decode_picture(image))
    return frames


def pick_frames(available: int, wanted: int, seed: int | None = None) -> list[int]:
    """Selects `wanted` of `available` frames; returns their indices in ascending order.

    If there are fewer frames than wanted, some are repeated, evenly spaced.

    Args:
        available: number of frames, at least 1.
        wanted: number of frames to select, at least 1.
        seed: None selects every `available // wanted`-th frame from the first one on, as the
            published code does; a number draws frames at random, as the paper describes.
    """
    if available < wanted:
        return np.linspace(0, available - 1, wanted).round().astype(int).tolist()
    if seed is None:
        return [index * (available // wanted) for index in range(wanted)]
    return sorted(random.Random(seed).sample(range(available), wanted))


def _frame_files(folder: Path) -> list[Path]:
    files = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in _IMAGE_SUFFIXES and not path.name.startswith(".")
    ]
    if not files:
        raise ValueError(f"video folder {folder} must hold pictures such as PNG or JPEG, has none")
    return sorted(files, key=lambda path: (_natural(path.name), path.name))


def _natural(name: str) -> list[str | int]:
    """Sort key in which runs of digits compare by value; every second part of the split is one."""
    parts = re.split("([0-9]+)", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]


def _is_picture(source: Path | BinaryIO) -> bool:
    """Whether Pillow reads a file; True for picture suffixes, so that damage is reported."""
    if isinstance(source, Path) and source.suffix.lower() in _IMAGE_SUFFIXES - {".avif"}:
        return True
    try:
        with Image.open(source) as image:
            return image.format in _IMAGE_FORMATS
    except Exception:  # Pillow's readers try every file, and raise errors of many kinds
        return False
    finally:
        if not isinstance(source, Path):
            source.seek(0)
