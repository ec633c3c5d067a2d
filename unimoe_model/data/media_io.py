"""Reading a user's pictures and videos from disk."""

import random
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


def load_video(path: Path | str, num_frames: int = NUM_FRAMES, seed: int | None = None) -> Tensor:
    """Reads a video file, an animated GIF or WebP, or a folder of pictures in name order.

    Args:
        path: the file or folder. Files other than pictures are read by FFmpeg, through PyAV.
        num_frames: how many frames to pick; see `pick_frames`.
        seed: None picks evenly, a number at random.

    Returns:
        ``[num_frames, H, W, 3]`` uint8, RGB.

    Raises:
        ValueError: the path is missing, damaged, holds no pictures, or pictures of several sizes.
        ModuleNotFoundError: PyAV is not installed, and the file needs it.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in _IMAGE_SUFFIXES)
        if not files:
            raise ValueError(
                f"video folder {path} must hold pictures such as PNG or JPEG, has none"
            )
        frames = [load_image(files[i]) for i in pick_frames(len(files), num_frames, seed)]
    else:
        _require_file(path, "a video such as MP4, an animated GIF or a folder of pictures")
        read = _animation if path.suffix.lower() in _IMAGE_SUFFIXES else _stream
        try:
            frames = read(path, num_frames, seed)
        except ModuleNotFoundError:
            raise
        except Exception as error:
            raise ValueError(
                f"video file {path} must be a whole video, animated GIF or folder of pictures: "
                f"{error}"
            ) from error
    sizes = sorted({(frame.shape[1], frame.shape[0]) for frame in frames})
    if len(sizes) > 1:
        raise ValueError(f"frames of video {path} must have one size, have {sizes}")
    return torch.stack(frames)


def pick_frames(available: int, wanted: int, seed: int | None = None) -> list[int]:
    """Indices of ``wanted`` of ``available`` frames, in ascending order.

    Args:
        available: at least 1.
        wanted: at least 1.
        seed: None takes every ``available // wanted``-th frame from the first one on, as the
            published code does; a number draws them at random, as the paper says. Of a video with
            fewer frames than wanted some are repeated, spread evenly.
    """
    if available < wanted:
        return np.linspace(0, available - 1, wanted).round().astype(int).tolist()
    if seed is None:
        return [index * (available // wanted) for index in range(wanted)]
    return sorted(random.Random(seed).sample(range(available), wanted))


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


def _animation(path: Path, num_frames: int, seed: int | None) -> list[Tensor]:
    with Image.open(path) as image:
        picked = pick_frames(getattr(image, "n_frames", 1), num_frames, seed)
        return [_frame(image, index) for index in picked]


def _stream(path: Path, num_frames: int, seed: int | None) -> list[Tensor]:
    """Frames of a file that FFmpeg reads, decoded once; containers may lie about their number."""
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"video file {path} needs the package av: pip install 'unimoe[demo]'"
        ) from error

    def decoded():
        with av.open(path) as container:
            if not container.streams.video:
                raise ValueError("it has no pictures")
            container.streams.video[0].thread_type = "AUTO"
            yield from container.decode(video=0)

    available = sum(1 for _ in decoded())
    if available == 0:
        raise ValueError("it has no frames")
    picked = pick_frames(available, num_frames, seed)
    wanted, last = set(picked), picked[-1]
    frames = {}
    for index, frame in enumerate(decoded()):
        if index in wanted:
            frames[index] = torch.from_numpy(frame.to_ndarray(format="rgb24"))
        if index == last:
            break
    return [frames[index] for index in picked]


def _frame(image: Image.Image, index: int) -> Tensor:
    image.seek(index)
    return _to_tensor(image)


def _to_tensor(image: Image.Image) -> Tensor:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB")))
