"""Fake Debian packages: a few tiny pictures and sounds where the real ones have theirs."""

import gzip

import numpy as np
import pytest

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("fontTools", reason="fonttools is not installed: pip install .[eval]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
import soundfile
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

STAMPS = {
    "animals/mammals/cow": "A cow.",
    "animals/mammals/pig_golden": "A Tamworth pig.",
    "animals/birds/owl": "An owl.",
    "animals/birds/mute": "A mute swan.",
    "food/fruit/grapes": "A cluster of grapes.",
    "town/cartoon/inn": "An inn.",
    "symbols/math/one": "One.",
    "household/shout": "Say cheese!",
    "animals/fish/long": "A very long name of some fish.",
}
SOUNDS = {
    "animals/mammals/cow": 3.0,
    "animals/mammals/pig_golden": 2.0,
    "animals/birds/owl": 6.0,
    "animals/birds/mute": 0.0,
}
"""Seconds; silence where there are none."""


PROMPTS = ("digits/0", "digits/7", "digits/13", "digits/day-0", "digits/mon-11", "phonetic/b_p")


def tone(seconds, rate, pitch=440.0):
    """A tone that grows louder, so that no part of it is like another."""
    times = np.arange(round(seconds * rate)) / rate
    return (0.4 * times / seconds * np.sin(2 * np.pi * pitch * times)).astype("f4")


def stamps_package(folder):
    root = folder / "usr/share/tuxpaint/stamps"
    for number, (place, caption) in enumerate(STAMPS.items()):
        path = root / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (30 + number, 20), (200, 10 * number, 0, 255)).save(path)
        path.with_suffix(".txt").write_text(f"{caption}\nde.utf8=Etwas.\n", encoding="utf-8")
    mirrored = root / "animals/mammals/cow_mirror.png"
    mirrored.write_bytes((root / "animals/mammals/cow.png").read_bytes())
    mirrored.with_suffix(".txt").write_text("A cow.\n", encoding="utf-8")
    for number, (place, seconds) in enumerate(SOUNDS.items()):
        samples = tone(seconds, 8000, 300 + 50 * number) if seconds else np.zeros(8000, "f4")
        soundfile.write(root / f"{place}.wav", samples, 8000)
    # The same recording, of another animal.
    copied = root / "animals/mammals/goat.wav"
    copied.write_bytes((root / "animals/mammals/cow.wav").read_bytes())
    for language in ("", "_fr"):
        said = root / f"animals/birds/owl_desc{language}.ogg"
        soundfile.write(said, tone(0.5, 16000), 16000, format="OGG", subtype="VORBIS")
    return folder


def asterisk_package(folder):
    root = folder / "usr/share/asterisk/sounds/en_US_f_Somebody"
    for name in (
        "digits/0",
        "digits/7",
        "digits/13",
        "digits/day-0",
        "digits/mon-11",
        "phonetic/b_p",
    ):
        path = root / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone(0.5, 8000), 8000)
    return folder


def pocketsphinx_package(folder):
    root = folder / "usr/share/pocketsphinx/test/data"
    for place, name, text in (
        ("cards", "cards.transcription", "ten of clubs "),
        ("librivox", "transcription", "he was not ill"),
    ):
        (root / place).mkdir(parents=True)
        (root / place / name).write_text(
            f"<s> {text} </s> (one)\n<s> gone </s> (two)\n", encoding="utf-8"
        )
        soundfile.write(root / place / "one.wav", tone(1, 16000), 16000)
    return folder


def sonic_pi_package(folder):
    root = folder / "usr/share/sonic-pi/samples"
    root.mkdir(parents=True)
    for name, seconds in (("bd_boom", 0.3), ("tabla_na", 4.0), ("misc_burp", 1.0)):
        soundfile.write(root / f"{name}.flac", tone(seconds, 44100), 44100)
    return folder


def devil_package(folder):
    path = folder / "usr/share/dictd/devil.dict.dz"
    path.parent.mkdir(parents=True)
    long = " ".join(["word"] * 30)
    text = f"Preface of the book\n\nABBOT, n. {long}\n\nABET, v. Too short.\n\nACE, n. {long} end\n"
    path.write_bytes(gzip.compress(text.encode()))
    return folder


def gemojione_package(folder):
    root = folder / "usr/share/rubygems-integration/all/gems/gemojione-3.3.0/assets/png"
    root.mkdir(parents=True)
    for code in ("1F415", "1F416", "1F600", "1F1E9-1F1EA"):
        Image.new("RGBA", (64, 64), (0, 90, 200, 255)).save(root / f"{code}.png")
    return folder


def twemoji_package(folder):
    """A font with one character, a dog that consists of a tall red and a wide blue rectangle."""
    path = folder / "usr/lib/firefox-esr/fonts/TwemojiMozilla.ttf"
    path.parent.mkdir(parents=True)
    names = [".notdef", "dog", "tall", "wide"]
    shapes = {"tall": (200, -100, 300, 700), "wide": (50, 0, 700, 200)}
    glyphs = {}
    for name in names:
        pen = TTGlyphPen(None)
        if name in shapes:
            left, bottom, right, top = shapes[name]
            pen.moveTo((left, bottom))
            for corner in ((left, top), (right, top), (right, bottom)):
                pen.lineTo(corner)
            pen.closePath()
        glyphs[name] = pen.glyph()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({0x1F415: "dog"})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(names, (800, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Layers", "styleName": "Regular"})
    builder.setupPost()
    builder.setupCOLR({"dog": [("tall", 0), ("wide", 1)]}, version=0)
    builder.setupCPAL([[(1, 0, 0, 1), (0, 0, 1, 1)]])
    builder.save(path)
    return folder
