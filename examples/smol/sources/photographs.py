"""Photographs of scikit-image, all held out, with names assigned here."""

from examples.smol.item import Item
from examples.stand_ins.assets import asset_file
from unimoe_model.extras import needed_by

with needed_by("reading pictures"):
    from PIL import Image

NAMES = {
    "astronaut.png": "woman",
    "camera.png": "camera",
    "chelsea.png": "cat",
    "coffee.png": "cup of coffee",
    "horse.png": "horse",
    "moon.png": "moon",
    "motorcycle_left.png": "motorcycle",
    "rocket.jpg": "rocket",
}


def pictures() -> list[Item]:
    """Returns the photographs of things that have a name.

    Raises:
        MissingAssetError: If the package scikit-image is not installed.
    """
    return [
        Item("photographs", "image", file.split(".")[0], name, name, _reader(file))
        for file, name in NAMES.items()
    ]


def _reader(file: str):
    path = asset_file("skimage", "data", file)
    return lambda: Image.open(path).convert("RGBA")
