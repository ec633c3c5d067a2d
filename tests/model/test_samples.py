import json

import pytest

from unimoe_model.evaluation.samples import Sample, line_named, read_samples


@pytest.fixture
def data(tmp_path):
    """Writes lines, given as objects or as text, and files of the names in them."""
    for name in ("a.png", "b.png", "q.wav"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "frames").mkdir()

    def write(*lines):
        path = tmp_path / "data.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return path

    return write


def test_lines_become_samples(data, tmp_path):
    path = data(
        {"id": "é", "question": " what? ", "image": ["a.png", "b.png"], "answers": ["x", "y"]},
        "",
        {"id": 2, "speech": "q.wav", "video": "frames", "answer": "B", "options": ["x", "y"]},
        {"id": "2b", "question": "why?"},
    )
    images = (tmp_path / "a.png", tmp_path / "b.png")
    both = {"video": (tmp_path / "frames",), "speech": (tmp_path / "q.wav",)}
    assert read_samples(path) == [
        Sample("é", 1, "what?", {"image": images}, ("x", "y")),
        Sample(2, 3, "", both, ("B",), ("x", "y")),
        Sample("2b", 4, "why?"),
    ]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_passed_over(data, mark):
    path = data({"id": "é", "question": "what?"})
    path.write_bytes(mark + path.read_bytes())
    assert read_samples(path) == [Sample("é", 1, "what?")]


ASKED = {"id": 1, "question": "what?"}


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{", "must be a JSON object: Expecting property name"),
        ("[1]", "must be a JSON object such as"),
        ({**ASKED, "picture": "a.png"}, r"unknown keys \['picture'\]; there are id, question, im"),
        ({"question": "what?"}, r"id \(None\) must be a text or a whole number"),
        ({**ASKED, "id": True}, r"id \(True\) must be a text or a whole number"),
        ({**ASKED, "id": ""}, r"id \(''\) must be"),
        ({**ASKED, "question": 3}, r"question \(3\) must be a text"),
        ({"id": 1}, r"question \(''\) must ask something where there is no media"),
        ({**ASKED, "image": 3}, r"image \(3\) must be a path or a list of paths"),
        ({**ASKED, "audio": []}, r"audio \(\[\]\) must be a path or a list of paths, none of"),
        ({**ASKED, "image": ["a.png", ""]}, r"image \(\['a.png', ''\]\) must be a path"),
        ({**ASKED, "answer": " "}, r"answer \(' '\) must be a text"),
        ({**ASKED, "answers": "x"}, r"answers \('x'\) must be a list of texts"),
        ({**ASKED, "answers": ["x"], "answer": "x"}, "answer and answers exclude each other"),
        ({**ASKED, "options": "AB"}, r"options \('AB'\) must be a list of texts"),
        ({**ASKED, "id": 7}, r"id \(7\) must be unique; line 1 has it too"),
        ({**ASKED, "id": "7"}, r"id \('7'\) must be unique; line 1 has it too"),
    ],
)
def test_wrong_lines(data, line, error):
    path = data({"id": 7, "question": "first"}, line)
    with pytest.raises(ValueError, match=rf"data\.jsonl line 2: {error}"):
        read_samples(path)


def test_refused_samples_are_named(data):
    def check(sample):
        if not sample.answers:
            raise ValueError("answer is missing")

    path = data({**ASKED, "answer": "x"}, {**ASKED, "id": 2})
    with pytest.raises(ValueError, match="line 2: answer is missing"):
        read_samples(path, check)


def test_missing_media_are_listed(data, tmp_path):
    lines = [{"id": i, "image": f"{i}.png"} for i in range(12)]
    path = data(*lines, {"id": "w", "speech": "frames", "video": "frames", "audio": ["q.wav"]})
    with pytest.raises(ValueError, match="13 media files are missing") as caught:
        read_samples(path)
    shown = str(caught.value)
    assert f"line 1 image ({tmp_path / '0.png'}); line 2 image" in shown
    assert shown.endswith("; and 3 more")


def test_a_folder_is_no_recording(data):
    path = data({"id": 1, "speech": "frames", "video": "frames"})
    with pytest.raises(ValueError, match=r"1 media files are missing: line 1 speech \(.*frames\)"):
        read_samples(path)


def test_no_file_no_text_and_no_lines(data, tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        read_samples(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="must hold at least one line"):
        read_samples(data("", ""))
    (tmp_path / "data.jsonl").write_bytes(b'{"id": "\xff"}')
    with pytest.raises(ValueError, match="must be UTF-8 text"):
        read_samples(tmp_path / "data.jsonl")


def test_errors_name_the_line(tmp_path):
    with (
        pytest.raises(ValueError, match=r"data line 4 \(id 'x'\): bad"),
        line_named(tmp_path / "data", Sample("x", 4)),
    ):
        raise ValueError("bad")
