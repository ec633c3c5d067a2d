"""Pictures of every mode and orientation, in all supported forms."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
from PIL import Image

from unimoe_model.data.media_io import load_image
from unimoe_model.data.media_items import as_picture
from unimoe_model.data.pictures import decode_picture

ORIENTATION = 0x0112


def written(image, format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decoded(content: bytes) -> np.ndarray:
    return load_image(content).numpy()


# Orientation

# What a viewer does with each value, from the rows and columns that the EXIF standard (4.6.4 A)
# says are the visual top and left.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: np.flip(a, 1),
    3: lambda a: np.rot90(a, 2),
    4: lambda a: np.flip(a, 0),
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.swapaxes(np.rot90(a, 2), 0, 1),
    8: lambda a: np.rot90(a, 1),
}


def pixels(height=20, width=40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [*UPRIGHT, 0, 9])
def test_pictures_stand_upright(format, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    content = written(Image.fromarray(pixels()), format, exif=exif, **options)
    expected = UPRIGHT.get(orientation, UPRIGHT[1])(pixels())
    assert np.array_equal(decoded(content), expected)
    with Image.open(io.BytesIO(content)) as image:
        assert np.array_equal(as_picture(image, "images"), expected)


def test_a_camera_held_upright():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    shot = np.zeros((20, 40, 3), np.uint8)
    shot[:, :10] = 255  # what is up lies on the left
    found = decoded(written(Image.fromarray(shot), "JPEG", exif=exif))
    assert found.shape == (40, 20, 3)
    assert found[:8].min() > 240
    assert found[12:].max() < 15


def test_damaged_exif_says_nothing():
    content = written(Image.fromarray(pixels()), exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
    assert np.array_equal(decoded(content), pixels())


# Modes


def grey_tiff(values: np.ndarray, bits: int, photometric: int = 1, sample_format: int = 1) -> bytes:
    """A TIFF of one strip; `values` `[H, W]` hold its bytes."""
    height, width = values.shape[0], values.shape[1] * values.itemsize * 8 // bits
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8}
    tags |= {277: 1, 278: height, 279: values.nbytes, 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = struct.pack("<2sHI", b"II", 42, 8 + values.nbytes)
    return start + values.tobytes() + struct.pack("<H", len(tags)) + entries + bytes(4)


DEEP = np.array([[0, 255, 256, 30000], [65535, 4660, 511, 512]], np.uint16)


@pytest.mark.parametrize(
    "content",
    [
        written(Image.fromarray(DEEP)),
        written(Image.fromarray(DEEP), "TIFF"),
        written(Image.fromarray(DEEP), "JPEG2000", irreversible=False),
        b"P5\n4 2\n65535\n" + DEEP.astype(">u2").tobytes(),
        grey_tiff(65535 - DEEP, 16, photometric=0),
    ],
    ids=["PNG", "TIFF", "JPEG2000", "PGM", "TIFF, white is zero"],
)
def test_16_bit_grey_keeps_its_high_byte(content):
    assert np.array_equal(decoded(content), np.repeat((DEEP >> 8)[..., None], 3, axis=2))


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_16_bit_images_keep_their_high_byte(mode):
    image = Image.new(mode, (2, 1), 0x1234)
    assert as_picture(image, "images").tolist() == [[[0x12] * 3] * 2]


def test_12_bit_grey():
    packed = np.array([[0x12, 0x3F, 0xFF]], np.uint8)  # 0x123 and 0xfff
    assert decoded(grey_tiff(packed, 12)).tolist() == [[[0x12] * 3, [0xFF] * 3]]


def test_floats_reach_from_0_to_1():
    values = np.array([[0, 0.25, 0.5, 1]], np.float32)
    expected = np.array([0, 64, 128, 255])
    for content in (
        written(Image.fromarray(values), "TIFF"),
        grey_tiff(1 - values, 32, photometric=0, sample_format=3),
    ):
        assert np.array_equal(decoded(content)[0, :, 0], expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("F", (2, 2), 255), r"mode F \(values 255 to 255\) must have values from 0 to 1"),
        (Image.new("F", (2, 2), -0.1), r"mode F \(values -0.1 to -0.1\)"),
        (Image.new("F", (2, 2), float("nan")), r"mode F \(values nan to nan\)"),
        (Image.new("I", (2, 2), 255), "mode I must be one of 1, L, .*; which number is white"),
        (Image.new("RGB", (0, 2)), "size 0 x 2 must be at least 1 x 1"),
    ],
)
def test_modes_without_a_known_white_are_refused(image, message):
    with pytest.raises(ValueError, match=rf"images \(Pillow image, mode \w+\): {message}"):
        as_picture(image, "images")


@pytest.mark.parametrize(("bits", "sample_format"), [(16, 2), (32, 1), (32, 2)])
def test_signed_and_wide_integers_are_refused(bits, sample_format):
    values = np.full((2, 2), 200, {16: np.int16, 32: np.int32}[bits])
    with pytest.raises(ValueError, match=r"<BytesIO> must be a whole picture.*mode I must be"):
        load_image(grey_tiff(values, bits, sample_format=sample_format))


def in_mode(flat: Image.Image, mode: str) -> Image.Image:
    """An opaque picture of one colour in a mode of Pillow's."""
    if mode.startswith("I;16"):
        return Image.new(mode, flat.size, flat.convert("L").getpixel((0, 0)) * 257)
    if mode in ("La", "PA"):
        return flat.convert("LA" if mode == "La" else "L").convert(mode)
    if mode == "RGBa":
        return flat.convert("RGBA").convert(mode)
    return flat.convert(mode, palette=Image.Palette.ADAPTIVE)


ROUNDING = {"YCbCr": 2, "HSV": 2, "LAB": 6}
COLORS = [(0, 0, 0), (255, 255, 255), (255, 0, 0), (80, 80, 80)]


@pytest.mark.parametrize(
    ("mode", "color"),
    [
        (mode, color)
        for mode in Image.MODES
        for color in COLORS[: {"1": 2, "F": 1, "I": 0}.get(mode, 4)]
    ],
)
def test_every_mode_of_pillow(mode, color):
    flat = Image.new("RGB", (3, 2), color)
    image = in_mode(flat, mode)
    assert image.mode == mode
    in_color = len(image.getbands()) > 2 or mode == "P"
    shown = color if in_color else (flat.convert("L").getpixel((0, 0)),) * 3
    found = as_picture(image, "images").numpy().astype(int)
    assert found.shape == (2, 3, 3)
    assert np.abs(found - shown).max() <= ROUNDING.get(mode, 0)


# Transparency


@pytest.mark.parametrize(
    ("mode", "color", "shown"),
    [
        ("RGBA", (200, 0, 0, 0), [255, 255, 255]),
        ("RGBA", (200, 0, 100, 51), [244, 204, 224]),
        ("RGBa", (40, 0, 20, 51), [244, 204, 224]),
        ("LA", (0, 0), [255] * 3),
        ("LA", (100, 51), [224] * 3),
        ("La", (20, 51), [224] * 3),
    ],
)
def test_transparent_images_lie_on_white(mode, color, shown):
    image = Image.new(mode, (3, 2), color)
    found = as_picture(image, "images").numpy().astype(int)
    assert np.abs(found - shown).max() <= 1
    if mode in ("RGBA", "LA"):
        assert np.array_equal(decoded(written(image)), found)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_files_and_images_are_the_same(format, tmp_path):
    rgba = np.concatenate([pixels(16, 16), pixels(16, 16)[..., :1]], axis=2)
    path = tmp_path / f"a.{format.lower()}"
    try:
        path.write_bytes(written(Image.fromarray(rgba), format))
    except (OSError, KeyError):
        pytest.skip(f"this Pillow writes no {format}")
    expected = load_image(path)
    assert expected.float().std() > 10
    with Image.open(path) as image, path.open("rb") as file:
        rows = {"bytes": path.read_bytes(), "path": None}, {"bytes": None, "path": str(path)}
        loaded = image.copy()
        for given in (str(path), path.read_bytes(), file, file, image, loaded, *rows):
            assert torch.equal(as_picture(given, "images"), expected)


def test_a_transparent_color_of_png():
    deep = Image.fromarray(DEEP)
    found = decoded(written(deep, transparency=256))[..., 0]
    assert np.array_equal(found, np.where(DEEP == 256, 255, DEEP >> 8))
    levels = Image.fromarray(np.array([[0, 85, 170]], np.uint8))
    assert decoded(written(levels, transparency=85))[0, :, 0].tolist() == [0, 255, 170]
    colors = Image.fromarray(np.array([[[9, 0, 0], [0, 9, 0]]], np.uint8))
    found = decoded(written(colors, transparency=(9, 0, 0)))
    assert found.tolist() == [[[255] * 3, [0, 9, 0]]]


def png(bits: int, color_type: int, row: bytes, key: bytes, width: int) -> bytes:
    """A PNG of one row with a transparent colour, of depths that Pillow does not write."""

    def chunk(name, data):
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, 1, bits, color_type, 0, 0, 0)
    pixels = zlib.compress(b"\0" + row)
    chunks = ((b"IHDR", header), (b"tRNS", key), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*named) for named in chunks)


def test_a_transparent_color_of_png_with_few_or_many_bits():
    assert decoded(png(2, 0, b"\x1b", b"\0\1", 4))[0, :, 0].tolist() == [0, 255, 170, 255]
    assert decoded(png(4, 0, b"\x0a", b"\0\0", 2))[0, :, 0].tolist() == [255, 170]
    with pytest.raises(ValueError, match="16 bits a colour must have an alpha channel"):
        decoded(png(16, 2, b"\1\2\3\4\5\6", b"\1\2\3\4\5\6", 1))


# Arrays


def test_mirrored_and_strided_arrays():
    array = pixels()
    for view in (array[:, ::-1], array[..., ::-1], array[::2], np.asfortranarray(array)):
        assert np.array_equal(as_picture(view, "images"), view)


@pytest.mark.parametrize("item", [None, 7, object(), {"a": 1}, "x" * 3, [["a"]], np.array(["a"])])
def test_what_is_no_picture_is_refused(item):
    with pytest.raises(ValueError, match=r"images|no such file"):
        as_picture(item, "images")


def test_pictures_without_pixels_are_refused():
    with pytest.raises(ValueError, match=r"shape \[0, 4, 3\].* must have at least one pixel"):
        as_picture(np.zeros((0, 4, 3), np.uint8), "images")


def test_an_image_is_left_as_it_was():
    image = Image.fromarray(pixels())
    image.getexif()[ORIENTATION] = 6
    first = decode_picture(image)
    assert torch.equal(decode_picture(image), first)
    assert image.size == (40, 20)
    first.zero_()
    assert np.array_equal(np.asarray(image), pixels())
