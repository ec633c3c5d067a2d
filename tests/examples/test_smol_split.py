"""The committed split: what is held out is in no training example, and stays so."""

import json

import pytest

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
from demo_assets import needs
from smol_packages import sonic_pi_package, stamps_package

from examples.demo.general_midi import PITCHES_AND_VELOCITIES
from examples.demo.spoken import QUESTION_VOICES, WORD_VOICES
from examples.smol import split as splits
from examples.smol.catalogue import Catalogue
from examples.smol.data import build_examples, counts
from examples.smol.item import Item
from examples.smol.media import MediaPlan
from examples.smol.sizes import Sizes
from examples.smol.sources import sonic_pi, stamps
from examples.smol.sources.conversations import Prompt, prompts
from examples.smol.sources.instructions import instructions

WRITTEN = {"write about this: owl": "An owl hoots."}
SIZES = Sizes(variants=2, asked_pictures=4, words=200, questions=30, held_out=200)


def drawing(style, name):
    return Item(style, "image", name, name, name, lambda: None)


@pytest.fixture
def catalogue(tmp_path):
    debian = stamps_package(tmp_path / "stamps")
    names = ("cow", "pig", "dog", "owl")
    return Catalogue(
        drawings={
            "openmoji": [drawing("openmoji", name) for name in names],
            "gemojione": [drawing("gemojione", name) for name in names[:2]],
            "noto": [drawing("noto", name) for name in (*names, "unknown")],
        },
        stamps=stamps.pictures(debian, names),
        sounds=stamps.sounds(debian) + sonic_pi.sounds(sonic_pi_package(tmp_path / "sonic")),
        words=[Item("asterisk", "speech", "7", "seven", "somebody", lambda: None)],
        instructions=instructions(),
        prompts=[Prompt(f"trivia/{number}", f"question {number}?", "") for number in range(9)],
    )


HELD_OUT = {
    "stamps": frozenset({"owl"}),
    "sounds": frozenset({"sonic_pi tabla_na"}),
    "instructions": frozenset({"3 plus 9", "say water", "opposite of hot"}),
}


@needs("easy_vqa")
def test_held_out_things_are_in_no_training_example(catalogue, tmp_path):
    plan = MediaPlan(tmp_path / "media")
    chat = {"train": [("a?", "b.")] * 3, "test": [("c?", "d.")]}
    examples = build_examples(catalogue, HELD_OUT, plan, SIZES, chat, WRITTEN)
    test = examples["test"]
    media = {
        name: {path for own in tasks.values() for example in own for _, path in example.media}
        for name, tasks in examples.items()
    }
    assert media["train"]
    assert not media["train"] & media["test"]

    origin = {path: item for path, (item, _) in plan.pictures.items()}
    learned = [origin[path] for path in media["train"] if path in origin]
    assert {item.source for item in learned} == {"openmoji", "gemojione", "stamps"}
    assert "owl" not in {item.group for item in learned if item.source == "stamps"}
    asked = [example.answer for example in test["drawing"]]
    assert sorted(asked) == ["cow", "dog", "owl", "pig"]
    assert [example.answer for example in test["stamp"]] == ["owl"]
    assert [example.answer for example in test["digit"]] == ["seven"]

    heard = {plan.sounds[path].group for path in media["train"] if path in plan.sounds}
    assert "bd_boom" in heard
    assert "tabla_na" not in heard
    assert {plan.sounds[path].group for path in media["test"] if path in plan.sounds} == {
        "tabla_na"
    }

    voices = {
        name: {plan.phrases[path][1] for path in paths if path in plan.phrases}
        for name, paths in media.items()
    }
    assert voices["train"] <= {*WORD_VOICES["train"], *QUESTION_VOICES["train"]}
    assert voices["test"] <= {*WORD_VOICES["test"], *QUESTION_VOICES["test"]}
    said = {plan.phrases[path][0] for path in media["train"] if path in plan.phrases}
    assert "what is four plus nine?" in said
    assert not said & {
        "what is nine plus three?",
        "what is three plus nine?",
        "say the word water.",
    }
    new = {plan.phrases[e.media[0][1]][0] for e in test["new_instruction"]}
    assert "what is three plus nine?" in new
    assert "what is four plus nine?" not in new

    notes = {
        name: {plan.notes[p] for p in paths if p in plan.notes} for name, paths in media.items()
    }
    for name, (pitches, velocities) in PITCHES_AND_VELOCITIES.items():
        for _, pitch, velocity in notes.get(name, ()):
            assert pitch in pitches
            assert velocity in velocities
    assert "drawing" in counts(examples)
    (text,) = examples["train"]["writing"]
    assert (text.question, text.answer) == ("write about this: owl", "An owl hoots.")


@needs("easy_vqa")
def test_examples_are_the_same_each_time(catalogue, tmp_path):
    chat = {"train": [("a?", "b.")] * 3, "test": [("c?", "d.")]}
    built = [
        build_examples(catalogue, HELD_OUT, MediaPlan(tmp_path), SIZES, chat, WRITTEN)
        for _ in range(2)
    ]
    assert built[0] == built[1]
    assert all(own for tasks in built[0].values() for own in tasks.values())


def test_two_phrases_never_share_a_file(tmp_path):
    plan = MediaPlan(tmp_path)
    path = plan.phrase("what is it?", "en-us+f2")
    assert plan.phrase("what is it?", "en-us+f2") == path
    assert plan.phrase("what is it?", "en-us+f3") != path
    plan.phrases[path] = ("other", "voice")
    with pytest.raises(ValueError, match="two phrases have the file"):
        plan.phrase("what is it?", "en-us+f2")


def test_one_group_in_five_is_drawn_by_its_name_alone():
    groups = [f"thing {number}" for number in range(500)]
    drawn = splits.draw_split({"stamps": groups})["stamps"]
    assert 70 < len(drawn) < 130
    assert splits.draw_split({"stamps": [*groups[::-1], "new thing"]})["stamps"] in (
        drawn,
        sorted([*drawn, "new thing"]),
    )


def test_the_committed_split_holds_names_that_the_rule_draws():
    held_out = splits.read_split()
    assert set(held_out) == {"stamps", "sounds", "descriptions", "instructions", "prompts"}
    for source, groups in held_out.items():
        assert groups
        assert all(splits.is_drawn(source, group) for group in groups)
        assert all(len(group) < 60 for group in groups)
    drawn = splits.draw_split({"instructions": {own.group for own in instructions()}})
    assert held_out["instructions"] == set(drawn["instructions"])


@needs("chatterbot_corpus")
def test_the_committed_split_is_that_of_the_corpus():
    found = {prompt.name for prompt in prompts()}
    drawn = splits.draw_split({"prompts": found})["prompts"]
    assert splits.read_split()["prompts"] == set(drawn)


def test_a_damaged_split_is_refused(tmp_path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps(["owl"]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"split \(.*split.json\) must be a JSON object"):
        splits.read_split(path)
