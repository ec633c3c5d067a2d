"""Training data that is refused, naming file, line or item, key and value."""

import json

import pytest
from talks import refusal, talk

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")


ASKED = {"id": 1, "question": "what?", "answer": "x"}
LONG = "é" * 500


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ({"id": 1, "question": "what?"}, "answer or answers is missing; training requires"),
        ({**ASKED, "id": None}, "id (None) must be a text or a whole number"),
        ({**ASKED, "picture": "a.png"}, "unknown keys ['picture']; there are id, question, image"),
        ({**ASKED, "image": 3}, "image (3) must be a path or a list of paths"),
        ({**ASKED, "answer": " "}, "answer (' ') must be a text"),
        ({**ASKED, "answer": "<image>"}, "answer ('<image>') must hold no placeholder; it is an"),
        ({**ASKED, "answers": [LONG, 1]}, "answer and answers exclude each other"),
        ({**ASKED, "options": ["x"]}, "options (1) must be 2 to 26, one a letter"),
        ({**ASKED, "options": ["y", "z"]}, "answer ('x') must be the letter (A to B) or the text"),
        (
            {**ASKED, "question": "<image>?", "image": "a.png", "speech": "q.wav"},
            "speech (1 files) must be one file for each <speech> in the questions, which hold 0",
        ),
        ({**ASKED, "id": 7}, "id (7) must be unique; line 1 has it too"),
        ('{"id": 1,', "must be a JSON object: Expecting property name"),
        ("what?", "must be a JSON object: Expecting value"),
        ("[1]", "must be a JSON object such as"),
        ('{"data": []}', "unknown keys ['data']"),
        (talk("q"), "conversations turn 1 value ('q') must be followed by an answer"),
    ],
)
def test_wrong_lines(write_talks, line, error):
    line = line if isinstance(line, str) else json.dumps(line)
    path = write_talks(f"{json.dumps({**ASKED, 'id': 7})}\n{line}\n", "data.jsonl")
    assert refusal(path).startswith(f"data.jsonl line 2: {error}")


def said(*turns):
    """An object of a conversation whose turns are given as they are."""
    return {"conversations": list(turns)}


HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}


@pytest.mark.parametrize(
    ("item", "error"),
    [
        (7, "value (7) must be an object with conversations"),
        (ASKED, "unknown keys ['question', 'answer']; there are id, image, video"),
        (talk("q", "r", images="a.png"), "unknown keys ['images']; there are id, image"),
        (talk("<audio>", "r", voice=["q.wav"]), "voice (['q.wav']) may be speech or any sound; it"),
        (talk("q", "r", id=True), "id (True) must be a text or a whole number"),
        (talk("q", "r", image=None), "image (None) must be a path or a list of paths, none of"),
        (talk("q", "r", audio=[]), "audio ([]) must be a path or a list of paths, none of them"),
        ({"id": 1}, "conversations (None) must be a list of turns, human first"),
        (talk(), "conversations ([]) must be a list of turns, human first"),
        ({"conversations": "q"}, "conversations ('q') must be a list of turns"),
        (said("q", "r"), "conversations turn 1 ('q') must be an object of from and value"),
        (said(HUMAN, {**GPT, "weight": 1}), "conversations turn 2 has unknown keys ['weight']"),
        (
            said({"from": "system", "value": "s"}, HUMAN, GPT),
            "conversations turn 1 from ('system') must be human or user; the model's own system"
            " prompt comes first",
        ),
        (
            said(GPT, HUMAN),
            "conversations turn 1 from ('gpt') must be human or user; turns alternate, human comes",
        ),
        (said(HUMAN, HUMAN), "conversations turn 2 from ('human') must be gpt or assistant; turns"),
        (said(HUMAN, GPT, GPT), "conversations turn 3 from ('gpt') must be human or user; turns"),
        (said({"value": "q"}, GPT), "conversations turn 1 from (None) must be human or user"),
        (said({"from": "human"}, GPT), "conversations turn 1 value (None) must be a text"),
        (talk("q", "r", "s"), "conversations turn 3 value ('s') must be followed by an answer"),
        (talk("q", " \n"), r"conversations turn 2 value (' \n') must not be empty"),
        (talk("", "r"), "conversations turn 1 value ('') must not be empty"),
        (talk("q", "r", " ", "s"), "conversations turn 3 value (' ') must not be empty"),
        (
            talk("<image>", "r <image>", image=["a.png", "b.png"]),
            "conversations turn 2 value ('r <image>') must hold no placeholder; it is an answer",
        ),
        (talk("q", "\ud800"), r"conversations turn 2 value ('\ud800') must be Unicode text"),
        (
            talk("<image>", "r", "<image>", "s", image="a.png"),
            "image (1 files) must be one file for each <image> in the questions, which hold 2",
        ),
        (
            talk("<audio>", "r", image="a.png"),
            "audio (0 files) must be one file for each <audio> in the questions, which hold 1",
        ),
        (
            talk("<video>", "r", video=["a.png", "b.png"]),
            "video (2 files) must be one file for each <video> in the questions, which hold 1;"
            " frames of one video must be in a folder",
        ),
    ],
)
def test_wrong_items(write_talks, item, error):
    path = write_talks([talk("q", "r"), item])
    assert refusal(path).startswith(f"data.json item 2: {error}")


@pytest.mark.parametrize(
    "item",
    [
        talk(LONG),
        talk(LONG, f"<image>{LONG}"),
        talk("q", "r", **{LONG: 1}),
        talk("q", "r", id=[LONG]),
        talk("q", "r", image=[LONG, 1]),
        said({"from": LONG}),
        {"conversations": LONG},
        LONG,
        talk("q", "r", image=LONG * 9),
    ],
)
def test_long_values_are_shortened(write_talks, item):
    message = refusal(write_talks([item]))
    assert "ééé" in message
    assert "..." in message
    assert len(message) < 330


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("", "must hold at least one conversation"),
        (" \n\n", "must hold at least one conversation"),
        ("[]", "must hold at least one conversation"),
        ('[{"id": 1},', "must be one whole JSON array: Expecting value: line 1 column 12"),
        ("[1]\n[2]", "must be one whole JSON array: Extra data: line 2"),
        ("[" * 200_000, "must be one whole JSON array: maximum recursion depth"),
        (b'[{"id": "\xff"}]', "must be UTF-8 text: "),
        (b'{"id": "\xff"}', "must be UTF-8 text: "),
        ("[1]".encode("utf-16"), "must be UTF-8 text: "),
    ],
)
def test_files_that_hold_no_conversations(write_talks, content, error):
    assert refusal(write_talks(content)).startswith(f"data (data.json) {error}")


def test_an_object_around_the_lines_is_no_array(write_talks):
    path = write_talks(json.dumps({"data": [talk("q", "r")]}, indent=4))
    assert refusal(path).startswith("data.json line 1: must be a JSON object: Expecting property")
    path = write_talks({"data": [talk("q", "r")]})
    assert refusal(path).startswith("data.json line 1: unknown keys ['data']; there are id")


def test_there_must_be_a_file(tmp_path):
    expected = "must be a file of JSON lines, or of one JSON array; there is no such file"
    assert refusal(tmp_path / "none") == f"data (none) {expected}"
    assert "there is no such file" in refusal(tmp_path)


def test_all_missing_media_are_listed(write_talks):
    items = [talk("q", "r", image=["a.png", f"{number}.png"]) for number in range(11)]
    items.append(talk("q", "r", speech="frames", video="frames"))
    message = refusal(write_talks(items))
    assert message.startswith(
        "data.json: 12 media files are missing: item 1 image (0.png); item 2 image (1.png); "
    )
    assert message.endswith("item 10 image (9.png); and 2 more")
    message = refusal(write_talks(json.dumps({**ASKED, "speech": "frames"}), "data.jsonl"))
    assert message == "data.jsonl: 1 media files are missing: line 1 speech (frames)"


def test_media_are_looked_for_after_all_is_read(write_talks):
    path = write_talks([talk("q", "r", image="none.png"), talk("q")])
    assert refusal(path).startswith("data.json item 2: ")
