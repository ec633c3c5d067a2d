"""Reading a user's pictures and videos from disk."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

NUM_FRAMES = 8
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}


def load_image(path: Path | str) -> Tensor:
    """Reads a picture; of an animated one, the first frame.

    Returns:
        ``[H, W, 3]`` uint8, RGB; transparency is put on white.

    Raises:
        ValueError: the file is missing, damaged or no picture.
    """
    path = Path(path)
    _require_file(path, "a picture such as PNG or JPEG")
    try:
        with Image.open(path) as image:
            return _to_tensor(image)
    # Pillow's decoders raise errors of many kinds on damaged bytes, IndexError among them.
    except Exception as error:
        raise ValueError(
            f"image file {path} must be a whole picture such as PNG or JPEG: {error}"
        ) from error


def load_video(path: Path | str, num_frames: int = NUM_FRAMES) -> Tensor:
    """Reads a video: an animated GIF or WebP, or a folder of pictures in the order of their names.

    Args:
        path: the file or folder.
        num_frames: how many frames to pick, evenly from first to last; those of a video with
            fewer are repeated.

    Returns:
        ``[num_frames, H, W, 3]`` uint8, RGB.

    Raises:
        ValueError: the path is missing, damaged, holds no pictures, or pictures of several sizes.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in _IMAGE_SUFFIXES)
        if not files:
            raise ValueError(
                f"video folder {path} must hold pictures such as PNG or JPEG, has none"
            )
        frames = [load_image(files[i]) for i in pick_frames(len(files), num_frames)]
    else:
        _require_file(path, "an animated GIF or a folder of pictures")
        try:
            with Image.open(path) as image:
                picked = pick_frames(getattr(image, "n_frames", 1), num_frames)
                frames = [_frame(image, i) for i in picked]
        except Exception as error:
            raise ValueError(
                f"video file {path} must be a whole animated GIF or a folder of pictures: {error}"
            ) from error
    sizes = sorted({(frame.shape[1], frame.shape[0]) for frame in frames})
    if len(sizes) > 1:
        raise ValueError(f"frames of video {path} must have one size, have {sizes}")
    return torch.stack(frames)


def pick_frames(available: int, wanted: int) -> list[int]:
    """Indices of ``wanted`` frames spread evenly from the first to the last of ``available``."""
    return np.linspace(0, available - 1, wanted).round().astype(int).tolist()


def save_gif(path: Path | str, frames: Tensor | np.ndarray, frame_ms: int = 120) -> None:
    """Writes frames ``[n, H, W, 3]`` uint8 as an animated GIF that repeats for ever."""
    images = [Image.fromarray(np.asarray(frame)) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=frame_ms, loop=0)


def resize_square(images: Tensor, size: int) -> Tensor:
    """Cuts the middle square out of pictures and resizes it.

    Args:
        images: ``[H, W, 3]`` or ``[B, H, W, 3]`` uint8.
        size: side of the result in pixels.

    Returns:
        ``[size, size, 3]`` or ``[B, size, size, 3]`` uint8.
    """
    if images.ndim == 4:
        return torch.stack([resize_square(image, size) for image in images])
    height, width, _ = images.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(images[top : top + side, left : left + side].numpy())
    if side != size:
        square = square.resize((size, size), Image.Resampling.BICUBIC)
    return _to_tensor(square)


def _require_file(path: Path, expected: str) -> None:
    if not path.is_file():
        raise ValueError(f"file {path} must be {expected}; there is no such file")


def _frame(image: Image.Image, index: int) -> Tensor:
    image.seek(index)
    return _to_tensor(image)


def _to_tensor(image: Image.Image) -> Tensor:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB")))
