"""Decoding of Pillow images of any mode, with orientation applied and transparency removed."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unimoe_model.extras import needed_by

with needed_by("reading pictures"):
    from PIL import ExifTags, Image

_EXIF_TURNS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
"""Arguments of `turned` for each orientation; any other value leaves a picture as it is."""

_COLOR_MODES = ("1", "L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX")
_COLOR_MODES += ("CMYK", "HSV", "LAB", "YCbCr")
_KEY_SCALES = {"L;2": 85, "L;4": 17}  # Pillow widens such grey levels to 8 bits, but not tRNS
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags
_WHITE_IS_ZERO = 0


def decode_picture(image: Image.Image) -> Tensor:
    """Decodes a Pillow image as a viewer displays it on a white background.

    The EXIF orientation is applied. 16-bit grey keeps its high byte; float grey must be 0 to 1.

    Args:
        image: an open image; of an animation, the current frame is decoded.

    Returns:
        `[H, W, 3]` uint8, RGB.

    Raises:
        ValueError: If the white level is unknown (32-bit integers, floats outside of 0 to 1), the
            mode is not supported, or the image has no pixels.
    """
    if 0 in image.size:
        raise ValueError(f"size {image.width} x {image.height} must be at least 1 x 1")
    raw_mode = _raw_png_mode(image)
    # Pillow applies the orientation of a TIFF while loading it, and then removes the tag.
    image.load()
    return torch.from_numpy(turned(_pixels(image, raw_mode), *_turn(image)))


def turned(
    pixels: NDArray[np.uint8], transpose: bool, flip_rows: bool, flip_columns: bool
) -> NDArray[np.uint8]:
    """Pixels `[H, W, ...]` transposed and then flipped; contiguous and writeable."""
    if transpose:
        pixels = pixels.swapaxes(0, 1)
    if flip_rows:
        pixels = pixels[::-1]
    if flip_columns:
        pixels = pixels[:, ::-1]
    return np.require(pixels, requirements=["C", "W"])


def on_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Composites pixels `[H, W, 4]` with straight alpha on white; returns `[H, W, 3]` uint8."""
    image = Image.fromarray(rgba)
    white = Image.new("RGBA", image.size, "white")
    return np.array(Image.alpha_composite(white, image).convert("RGB"))


def _pixels(image: Image.Image, raw_mode: str | None) -> NDArray[np.uint8]:
    key = image.info.get("transparency")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _as_rgb(*_grey_of_16_bits(image), key)
    if image.mode == "F":
        return _as_rgb(*_grey_of_floats(image))
    if image.mode not in _COLOR_MODES:
        raise ValueError(
            f"mode {image.mode} must be one of {', '.join((*_COLOR_MODES, 'I;16', 'F'))}; which"
            " number is white in another is not known"
        )
    if image.mode == "L" and isinstance(key, int):
        grey = np.asarray(image)
        return _as_rgb(grey, grey, key * _KEY_SCALES.get(raw_mode, 1))
    if raw_mode == "RGB;16B" and key is not None:
        raise ValueError("a PNG of 16 bits a colour must have an alpha channel or no transparency")
    if not image.has_transparency_data:
        return np.array(image.convert("RGB"))
    straight = image.convert("LA") if image.mode == "La" else image
    return on_white(np.asarray(straight.convert("RGBA")))


def _grey_of_16_bits(image: Image.Image) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Grey levels in 8 bits, and the original values."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    values = np.asarray(image).astype(np.int64)
    grey = (values >> (bits - 8)).astype(np.uint8)
    return (255 - grey if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else grey), values


def _grey_of_floats(image: Image.Image) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):  # false for NaN
        raise ValueError(f"mode F (values {low:g} to {high:g}) must have values from 0 to 1")
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = 1 - values
    return (values * 255).round().astype(np.uint8), values


def _as_rgb(grey: NDArray[np.uint8], values: NDArray, key: int | None = None) -> NDArray[np.uint8]:
    """Three equal channels; white where `values` equal the transparent value `key`."""
    if key is not None:
        grey = np.where(values == key, np.uint8(255), grey)
    return np.repeat(grey[..., None], 3, axis=2)


def _raw_png_mode(image: Image.Image) -> str | None:
    """The raw mode of a PNG that has not been loaded; None for other files."""
    tiles = getattr(image, "tile", None)
    return tiles[0][3] if image.format == "PNG" and tiles else None


def _turn(image: Image.Image) -> tuple[bool, bool, bool]:
    upright = (False, False, False)
    try:
        return _EXIF_TURNS.get(image.getexif().get(ExifTags.Base.Orientation), upright)
    # Pillow raises errors of many kinds for a damaged EXIF block, which is ignored.
    except Exception:
        return upright
