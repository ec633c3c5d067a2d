"""Conversations of several questions about one picture."""

from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")

from examples.demo.data import json_lines
from examples.demo.example import Example
from examples.smol.tasks.follow_ups import MOST_TURNS, follow_ups
from unimoe_model.data.conversations import read_conversations

KNOWN = {
    "what color is the shape?": "red",
    "what shape does the image contain?": "circle",
    "which shape is in the picture, and what color is it?": "red circle",
    "what color is it?": "red",
    "what shape is it?": "circle",
    "<speech>": "yes",
    "what is this?": "dog",
    "what kind of thing is in the picture?": "animal",
    "what kind of thing is it?": "animal",
}


def questions(folder: Path, number: int) -> list[Example]:
    """Several questions about a shape and about a thing, and one about a third picture."""
    shape, thing, alone = (folder / f"{name}-{number}.png" for name in ("shape", "thing", "alone"))
    spoken = folder / f"{number}.flac"
    for path in (shape, thing, alone, spoken):
        path.touch()
    typed = [
        ("image_qa", "what color is the shape?", shape),
        ("image_qa", "what shape does the image contain?", shape),
        ("shape", "which shape is in the picture, and what color is it?", shape),
        ("picture", "what is this?", thing),
        ("kind", "what kind of thing is in the picture?", thing),
        ("picture", "what is this?", alone),
    ]
    asked = [Example(task, text, KNOWN[text], (("image", path),)) for task, text, path in typed]
    media = (("image", shape), ("speech", spoken))
    return [*asked, Example("spoken_question", "", "yes", media)]


@pytest.fixture
def conversations(tmp_path):
    (tmp_path / "train").mkdir()
    examples = follow_ups(own for number in range(40) for own in questions(tmp_path, number))
    path = tmp_path / "train" / "follow_up.jsonl"
    path.write_text(json_lines(examples, tmp_path))
    return list(read_conversations(path))


def test_every_turn_has_the_answer_of_its_own_question(conversations):
    assert len(conversations) == 2 * 40
    for own in conversations:
        first, *others = own.turns
        assert first[0].startswith("<image>\n")
        asked = [(first[0].removeprefix("<image>\n"), first[1]), *others]
        assert 2 <= len(asked) <= MOST_TURNS
        assert asked == [(text, KNOWN[text]) for text, _ in asked]
        is_thing = "thing" in own.media[0][1].name
        assert all((text in list(KNOWN)[6:]) == is_thing for text, _ in asked)


def test_spoken_questions_bring_their_speech_first_or_later(conversations):
    places = set()
    for own in conversations:
        number = own.media[0][1].stem.split("-")[1]
        spoken = [place for place, (text, _) in enumerate(own.turns) if "<speech>" in text]
        assert [kind for kind, _ in own.media] == ["image"] + ["speech"] * len(spoken)
        assert all(path.stem == number for kind, path in own.media if kind == "speech")
        places |= set(spoken)
    assert places == set(range(MOST_TURNS))


def test_first_questions_do_not_say_it_and_later_ones_may(conversations):
    texts = [[text for text, _ in own.turns] for own in conversations]
    pronouns = {"what color is it?", "what shape is it?", "what kind of thing is it?"}
    assert pronouns <= {text for _, *later in texts for text in later}
    assert not any(first.removeprefix("<image>\n") in pronouns for first, *_ in texts)
