"""Videos: the right stream, upright, the right frames in the right order."""

import io
import struct

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
from PIL import Image

from unimoe_model.data.media_io import load_video
from unimoe_model.data.media_items import as_video

ONE = 1 << 16


def gray(levels, height=32, width=64) -> np.ndarray:
    """Frames of one level each."""
    levels = np.asarray(levels, np.uint8)[:, None, None, None]
    return np.broadcast_to(levels, (len(levels), height, width, 3)).copy()


def add_stream(container, frames, codec="mpeg4", pix_fmt="yuv420p", **options):
    import av

    stream = container.add_stream(codec, rate=10)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = pix_fmt
    stream.bit_rate = 4_000_000
    for name, value in options.items():
        setattr(stream, name, value)
    format = "rgba" if frames.shape[-1] == 4 else "rgb24"
    return stream, [av.VideoFrame.from_ndarray(frame, format=format) for frame in frames]


def write(path, *streams):
    """Writes streams, each the arguments of `add_stream` with its frames first."""
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install .[media]")
    with av.open(path, "w") as container:
        added = [add_stream(container, frames, **options) for frames, options in streams]
        for stream, frames in added:
            for frame in [*frames, None]:
                container.mux(stream.encode(frame))
    return path


# Rotation


def corner(height=32, width=64) -> np.ndarray:
    """A frame whose upper left quarter is white and whose upper right one is grey."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[: height // 2, : width // 2] = 255
    frame[: height // 2, width // 2 :] = 128
    return frame


MATRICES = {
    "none": ((ONE, 0, 0, ONE), lambda a: a),
    "-90 degrees": ((0, ONE, -ONE, 0), lambda a: np.rot90(a, -1)),
    "90 degrees": ((0, -ONE, ONE, 0), lambda a: np.rot90(a, 1)),
    "180 degrees": ((-ONE, 0, 0, -ONE), lambda a: np.rot90(a, 2)),
    "mirrored": ((-ONE, 0, 0, ONE), lambda a: np.flip(a, 1)),
    "upside down": ((ONE, 0, 0, -ONE), lambda a: np.flip(a, 0)),
    "transposed": ((0, ONE, ONE, 0), lambda a: np.swapaxes(a, 0, 1)),
    "transversed": ((0, -ONE, -ONE, 0), lambda a: np.swapaxes(np.rot90(a, 2), 0, 1)),
}


def with_matrix(path, a, b, c, d):
    """Puts a display matrix into the header of the first track of an MP4."""
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


@pytest.mark.parametrize("name", MATRICES)
def test_videos_are_turned_as_players_turn_them(tmp_path, name):
    path = write(tmp_path / "a.mp4", (np.stack([corner()] * 3), {}))
    matrix, turn = MATRICES[name]
    with_matrix(path, *matrix)
    video = load_video(path, 2).numpy().astype(int)
    expected = turn(corner())
    assert video.shape == (2, *expected.shape)
    assert np.abs(video - expected).mean() < 6


def test_other_rotations_are_refused(tmp_path):
    path = write(tmp_path / "a.mp4", (gray([0, 9]), {}))
    with_matrix(path, 46341, 46341, -46341, 46341)
    with pytest.raises(ValueError, match=r"a\.mp4.*rotation \(-45 degrees\) must be a multiple"):
        load_video(path)


# Streams

LEVELS = [20, 60, 100, 140, 180, 220]


def check_levels(video, levels):
    assert np.abs(video.float().mean((1, 2, 3)).numpy() - levels).max() < 4


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_cover_pictures_are_passed_over(tmp_path, suffix):
    pytest.importorskip("av", reason="PyAV is not installed: pip install .[media]")
    from av.stream import Disposition

    cover = {"codec": "mjpeg", "pix_fmt": "yuvj420p", "disposition": Disposition(0)}
    main = {"disposition": Disposition.default}
    path = write(tmp_path / f"a.{suffix}", (gray([250], 16, 16), cover), (gray(LEVELS), main))
    video = load_video(path, 6)
    assert video.shape == (6, 32, 64, 3)
    check_levels(video, LEVELS)


def save_animation(path, levels, mode="RGB", **options):
    images = [Image.fromarray(frame).convert(mode) for frame in gray(levels)]
    try:
        images[0].save(path, save_all=True, append_images=images[1:], duration=100, **options)
    except (OSError, KeyError):
        pytest.skip(f"this Pillow writes no {path.suffix}")


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_avif_has_its_frames_and_not_its_cover(tmp_path, mode):
    save_animation(tmp_path / "a.avif", LEVELS, mode)
    check_levels(load_video(tmp_path / "a.avif", 6), LEVELS)


@pytest.mark.parametrize("suffix", ["avif", "png", "webp"])
def test_transparent_animations_lie_on_white(tmp_path, suffix):
    images = [Image.new("RGBA", (32, 32), (level, level, level, 51)) for level in (0, 100)]
    path = tmp_path / f"a.{suffix}"
    options = {} if suffix == "avif" else {"lossless": True}
    try:
        images[0].save(path, save_all=True, append_images=images[1:], duration=100, **options)
    except (OSError, KeyError):
        pytest.skip(f"this Pillow writes no {suffix}")
    for given in (path, path.read_bytes()):
        check_levels(as_video(given, 2, "videos"), [204, 224])


def test_the_default_picture_of_an_apng_is_no_frame(tmp_path):
    save_animation(tmp_path / "a.png", [250, *LEVELS], default_image=True)
    check_levels(load_video(tmp_path / "a.png", 6), LEVELS)
    save_animation(tmp_path / "b.png", LEVELS)
    check_levels(load_video(tmp_path / "b.png", 6), LEVELS)


def test_transparent_videos_lie_on_white(tmp_path):
    frames = np.concatenate([gray([0, 0]), np.full((2, 32, 64, 1), 51, np.uint8)], axis=3)
    options = {"codec": "png", "pix_fmt": "rgba"}
    assert (load_video(write(tmp_path / "a.mov", (frames, options)), 2) == 204).all()


def test_no_video_in_the_file(tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install .[media]")
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.rate = 8000
        container.mux([*stream.encode(frame), *stream.encode()])
    with pytest.raises(ValueError, match=r"a\.mkv must be a whole video.*it has no pictures"):
        load_video(tmp_path / "a.mkv")


# Forms of videos


def test_videos_in_memory_and_open_files(tmp_path):
    path = write(tmp_path / "a.mp4", (gray(LEVELS), {}))
    expected = load_video(path, 4, seed=1)
    with path.open("rb") as file:
        content = path.read_bytes()
        for given in (str(path), content, io.BytesIO(content), file, file, {"bytes": content}):
            assert torch.equal(as_video(given, 4, "videos", seed=1), expected)
    with pytest.raises(ValueError, match=r"<BytesIO> must be a whole video"):
        as_video(content[:300], 4, "videos")


def test_animated_images_as_files_and_as_images(tmp_path):
    path = tmp_path / "a.gif"
    save_animation(path, LEVELS)
    expected = load_video(path, 3)
    check_levels(expected, LEVELS[::2])
    with Image.open(path) as image:
        image.seek(4)
        for given in (path.read_bytes(), io.BytesIO(path.read_bytes()), image):
            assert torch.equal(as_video(given, 3, "videos"), expected)


@pytest.mark.parametrize("item", [None, 7, object(), [], [None], np.zeros((0, 2, 2, 3), np.uint8)])
def test_what_is_no_video_is_refused(item):
    with pytest.raises(ValueError, match="videos"):
        as_video(item, 2, "videos")


# Folders


def save_frames(folder, names):
    """Saves a picture for each name, the first of level 0, the next of level 10."""
    for index, name in enumerate(names):
        Image.new("RGB", (4, 4), (10 * index,) * 3).save(folder / name)


def levels_of(video):
    return [int(level) // 10 for level in video[:, 0, 0, 0]]


def test_frames_are_in_natural_order(tmp_path):
    names = ["0.png", "1.png", "2.png", "9.png", "10.png", "11.png", "20.png", "100.png"]
    save_frames(tmp_path, names)
    assert levels_of(load_video(tmp_path, 8)) == list(range(8))


def test_frames_with_several_numbers_and_other_suffixes(tmp_path):
    names = ["a1_2.jpg", "a1_10.png", "a02_1.PNG", "a2_1.tif", "b.bmp"]
    save_frames(tmp_path, names)
    assert levels_of(load_video(tmp_path, 5)) == list(range(5))


def test_hidden_files_are_no_frames(tmp_path):
    save_frames(tmp_path, ["0.png", "1.png"])
    for name in ("._0.png", ".hidden.jpg"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7 of macOS")
    assert levels_of(load_video(tmp_path, 2)) == [0, 1]
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").unlink()
    with pytest.raises(ValueError, match="must hold pictures such as PNG or JPEG, has none"):
        load_video(tmp_path)
