"""Tux Paint's stamps: pictures of things with captions, sounds and spoken descriptions (GPL-2).

Half of the pictures are photographs of things without background, the others are drawings.
Letters, coins, chess pieces and other signs are left out. Some sounds are silent, some belong to
several animals, and some occur more than once; equal recordings form one group.
"""

import re
import zlib
from collections.abc import Collection
from functools import partial
from pathlib import Path

from examples.smol.item import Item
from examples.smol.recordings import clips_of, is_audible, read_mono
from examples.smol.sources.emoji_names import known_name
from unimoe_model.extras import needed_by

with needed_by("reading sounds"):
    import soundfile
with needed_by("reading pictures"):
    from PIL import Image

SOURCE = "stamps"
PACKAGE = "tuxpaint-stamps-default"
_PLACE = ("usr", "share", "tuxpaint", "stamps")
_MOST_WORDS = 3

CATEGORIES = {
    "animals": "animal",
    "food": "food",
    "plants": "plant",
    "clothes": "clothing",
    "vehicles": "vehicle",
    "town/houses": "building",
    "town/monuments": "building",
    "household": "household object",
    "space": "something in space",
    "sports": "sports equipment",
    "hobbies/music": "musical instrument",
    "seasonal/christmas": "christmas decoration",
}
"""Kind of thing that a picture shows, by folder."""
_LEFT_OUT = (
    "symbols/",
    "seasonal/hanukkah",
    "military/",
    "naturalforces/",
    "town/roadsigns",
    "people/body_parts",
)
"""Folders of signs, of pictures without a short name, and of white pictures."""
_CARTOON = "/cartoon/"

SOUND_KINDS = {
    "animals/birds": "bird",
    "animals/insects": "insect",
    "animals/mammals": "mammal",
    "hobbies/music": "musical instrument",
    "household": "household object",
}
"""Kind of thing that makes a sound, by folder."""


def pictures(package: Path, names: Collection[str] = ()) -> list[Item]:
    """Returns the pictures whose caption is a name of at most three words.

    Args:
        package: folder of the unpacked Debian package.
        names: known names; a caption that ends in one gets it as its label.
    """
    root = package.joinpath(*_PLACE)
    items = []
    for path in sorted(root.rglob("*.png")):
        place = path.relative_to(root).as_posix()
        name = caption(path)
        if not name or place.startswith(_LEFT_OUT) or path.stem.endswith("_mirror"):
            continue
        kind = "" if _CARTOON in place else _of_folder(place, CATEGORIES)
        items.append(
            Item(
                SOURCE,
                "image",
                _slug(place),
                known_name(name, names),
                name,
                _picture_reader(path),
                kind,
            )
        )
    return items


def sounds(package: Path) -> list[Item]:
    """Returns recordings of animals, instruments and things; the label is the kind of thing.

    Args:
        package: see `pictures`.
    """
    root = package.joinpath(*_PLACE)
    items = []
    for path in sorted([*root.rglob("*.ogg"), *root.rglob("*.wav")]):
        place = path.relative_to(root).as_posix()
        kind = _of_folder(place, SOUND_KINDS)
        if kind and "_desc" not in path.stem and is_audible(path):
            # Several animals, such as ram, goat and mountain goat, have the same recording.
            group = f"{kind} {recording_key(path)}"
            for number, read in enumerate(clips_of(path)):
                name = f"{_slug(place)}-{number}"
                items.append(Item(SOURCE, "audio", name, kind, group, read, caption(path)))
    return items


def descriptions(package: Path) -> list[Item]:
    """Returns spoken English names of pictures; the label is the picture's caption.

    Args:
        package: see `pictures`.
    """
    root = package.joinpath(*_PLACE)
    items = []
    for path in sorted(root.rglob("*_desc.ogg")):
        picture = path.with_name(path.name.replace("_desc.ogg", ".png"))
        text = first_line(picture)
        if text and is_audible(path):
            place = path.relative_to(root).as_posix()
            said = text.rstrip(".! ").lower()
            items.append(Item(SOURCE, "speech", _slug(place), said, said, partial(read_mono, path)))
    return items


def caption(picture: Path) -> str:
    """Returns the name of a picture in lower case without an article; empty if none is short.

    `"A white kitten."` gives `"white kitten"`.
    """
    text = re.sub(r"\([^)]*\)|[“”\"]", "", first_line(picture)).strip()
    name, articles = re.subn(r"^(a pair of|an?|the|some|two)\s+", "", text.lower().rstrip(". "))
    is_name = articles and re.fullmatch(r"[a-z][a-z' -]*", name)
    return " ".join(name.split()) if is_name and len(name.split()) <= _MOST_WORDS else ""


def first_line(picture: Path) -> str:
    """Returns the English description of a picture, from the text file next to it."""
    path = picture.with_suffix(".txt")
    if not path.is_file():
        return ""
    return path.read_text(encoding="utf-8").splitlines()[0].strip()


def recording_key(path: Path) -> str:
    """Returns a key that is equal for files with the same recording."""
    samples, rate = soundfile.read(path, dtype="int16")
    return f"{zlib.crc32(samples.tobytes()):08x}-{rate}"


def _of_folder(place: str, kinds: dict[str, str]) -> str:
    return next((kind for folder, kind in kinds.items() if place.startswith(f"{folder}/")), "")


def _slug(place: str) -> str:
    return re.sub("[^a-z0-9]+", "-", place.rsplit(".", 1)[0].lower()).strip("-")


def _picture_reader(path: Path):
    return lambda: Image.open(path).convert("RGBA")
