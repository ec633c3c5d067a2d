"""Twemoji's font, whose coloured characters have no outline of their own, for Pillow."""

import io
from pathlib import Path

from unimoe_model.extras import needed_by

with needed_by("drawing pictures", "eval"):
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from fontTools.ttLib import TTFont


def with_outlines(file: Path) -> bytes:
    """Returns a font in which the outline of each coloured character is the box of its layers.

    A character of a `COLR` font consists of coloured layers, each a glyph. Pillow crops it to the
    box of its own outline, which is empty in some fonts, so that nothing is drawn.

    Args:
        file: TrueType font with a `COLR` table of version 0.
    """
    with TTFont(file) as font:
        glyphs = font["glyf"]
        for name, layers in font["COLR"].ColorLayers.items():
            shapes = [glyphs[layer.name] for layer in layers]
            shapes = [shape for shape in shapes if shape.numberOfContours]
            if shapes:
                glyphs[name] = _box(
                    min(shape.xMin for shape in shapes),
                    min(shape.yMin for shape in shapes),
                    max(shape.xMax for shape in shapes),
                    max(shape.yMax for shape in shapes),
                )
        content = io.BytesIO()
        font.save(content)
    return content.getvalue()


def _box(left: int, bottom: int, right: int, top: int):
    pen = TTGlyphPen(None)
    pen.moveTo((left, bottom))
    for corner in ((left, top), (right, top), (right, bottom)):
        pen.lineTo(corner)
    pen.closePath()
    return pen.glyph()
