"""Examples of the page: a drawing, a tone and a video, generated on request."""

import wave
from pathlib import Path

import numpy as np

from unimoe_model.extras import needed_by

with needed_by("drawing examples", "serve"):
    from PIL import Image, ImageDraw

SAMPLE_RATE = 16_000

EXAMPLES = {
    "image": ("A triangle", "what shape is it?"),
    "audio": ("A tone", "how high is the tone?"),
    "video": ("A rolling ball", "what color is the shape?"),
}
"""Title and question by media kind."""


def make_example(kind: str, folder: Path) -> Path:
    """Writes the example of a media kind into a folder and returns its path."""
    if kind == "image":
        path = folder / "triangle.png"
        _picture("triangle", 0.5).save(path)
    elif kind == "audio":
        path = folder / "tone.wav"
        times = np.arange(SAMPLE_RATE) / SAMPLE_RATE
        swell = np.minimum(1, 20 * np.minimum(times, 1 - times))
        sound = 0.4 * swell * np.sin(2 * np.pi * 440 * times)
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
            file.writeframes((32767 * sound).astype("<i2").tobytes())
    else:
        path = folder / "ball.mp4"
        _film([_picture("circle", place) for place in np.linspace(0.2, 0.8, 24)], path)
    return path


def _picture(shape: str, place: float) -> Image.Image:
    """Draws a shape centred at `place`, a fraction of the width, at four times the size."""
    size = 4 * 192
    picture = Image.new("RGB", (size, size), "#8a8f98")
    pen = ImageDraw.Draw(picture)
    x, y, r = int(place * size), size // 2, size // 4
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill="#3344dd")
    else:
        pen.polygon([(x - r, y + r), (x + r, y + r), (x, y - r)], fill="#22aa44")
    return picture.resize((192, 192), Image.Resampling.LANCZOS)


def _film(pictures: list[Image.Image], path: Path) -> None:
    with needed_by("drawing examples", "serve"):
        import av

    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
