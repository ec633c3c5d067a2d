"""Pictures and videos from files."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
from PIL import Image

from unimoe_model.data import media_io


def picture(height: int, width: int, shade: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shade)
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)


def save(path, image: torch.Tensor) -> None:
    Image.fromarray(image.numpy()).save(path)


def test_picture_survives_a_round_trip(tmp_path):
    save(tmp_path / "a.png", picture(7, 11))
    assert torch.equal(media_io.load_image(tmp_path / "a.png"), picture(7, 11))


def test_transparent_and_gray_pictures_become_rgb(tmp_path):
    Image.new("RGBA", (2, 1), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert media_io.load_image(tmp_path / "clear.png").tolist() == [[[255, 255, 255]] * 2]
    Image.new("L", (1, 1), 7).save(tmp_path / "gray.png")
    assert media_io.load_image(tmp_path / "gray.png").tolist() == [[[7, 7, 7]]]


def truncated(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def no_picture(content: bytes) -> bytes:
    return b"RIFF" + bytes(40)


def emptied(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [truncated, no_picture, emptied])
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif"])
def test_damaged_file_is_named(tmp_path, damage, suffix):
    path = tmp_path / f"broken.{suffix}"
    save(path, picture(20, 20))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"broken\.{suffix} must be a whole picture"):
        media_io.load_image(path)
    with pytest.raises(ValueError, match=rf"broken\.{suffix} must be a whole video, animated GIF"):
        media_io.load_video(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.png must be a picture.*no such file"):
        media_io.load_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"none\.gif must be a video such as MP4.*no such file"):
        media_io.load_video(tmp_path / "none.gif")
    with pytest.raises(ValueError, match="must hold pictures"):
        media_io.load_video(tmp_path)


def test_gif_survives_a_round_trip(tmp_path):
    shades = torch.tensor([0, 40, 80, 120, 160, 200, 240, 255], dtype=torch.uint8)
    frames = shades[:, None, None, None].expand(8, 5, 6, 3).contiguous()
    first, *others = (Image.fromarray(frame.numpy()) for frame in frames)
    first.save(tmp_path / "clip.gif", save_all=True, append_images=others, duration=120, loop=0)
    assert torch.equal(media_io.load_video(tmp_path / "clip.gif"), frames)


def test_folder_is_a_video_of_evenly_picked_frames(tmp_path):
    for i in range(17):
        save(tmp_path / f"{i:02d}.png", picture(4, 5, shade=i))
    (tmp_path / "notes.txt").write_text("no frame")
    video = media_io.load_video(tmp_path)
    assert torch.equal(video, torch.stack([picture(4, 5, shade=i) for i in range(0, 15, 2)]))
    save(tmp_path / "00.png", picture(5, 5))
    with pytest.raises(ValueError, match=r"one size, have \[\(5, 4\), \(5, 5\)\]"):
        media_io.load_video(tmp_path)


@given(available=st.integers(1, 500), wanted=st.integers(1, 16), seed=st.none() | st.integers())
def test_picked_frames_are_in_order(available, wanted, seed):
    picked = media_io.pick_frames(available, wanted, seed)
    assert len(picked) == wanted
    assert picked == sorted(picked)
    assert 0 <= picked[0] <= picked[-1] < available
    gaps = np.diff(picked)
    if available >= wanted:
        assert len(set(picked)) == wanted
    else:
        assert set(picked) == set(range(available)) or wanted == 1
    if seed is None and wanted > 1:
        assert picked[0] == 0
        assert gaps.max() - gaps.min() <= (available < wanted)
        if available >= wanted:
            assert gaps.max() == available // wanted
    assert picked == media_io.pick_frames(available, wanted, seed)


def write_video(path, frames, rate=10):
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install .[media]")
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        for frame in frames:
            encoded = av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")
            container.mux(stream.encode(encoded))
        container.mux(stream.encode())


def test_frames_of_a_video_file(tmp_path):
    shades = torch.arange(20, 220, 10, dtype=torch.uint8)
    frames = shades[:, None, None, None].expand(-1, 32, 48, 3).contiguous()
    write_video(tmp_path / "clip.mp4", frames)
    video = media_io.load_video(tmp_path / "clip.mp4")
    assert video.shape == (8, 32, 48, 3)
    means = video.float().mean((1, 2, 3))
    assert (means - shades[:16:2].float()).abs().max() < 3
    drawn = media_io.load_video(tmp_path / "clip.mp4", seed=1).float().mean((1, 2, 3))
    expected = shades[media_io.pick_frames(20, 8, 1)].float()
    assert (drawn - expected).abs().max() < 3


@pytest.mark.parametrize("damage", [no_picture, emptied])
def test_damaged_video_is_named(tmp_path, damage):
    frames = torch.zeros(4, 32, 32, 3, dtype=torch.uint8)
    write_video(tmp_path / "broken.mp4", frames)
    path = tmp_path / "broken.mp4"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"broken\.mp4 must be a whole video"):
        media_io.load_video(path)
