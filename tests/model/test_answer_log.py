import json

import pytest

from unimoe_model.evaluation.answer_log import AnswerLog

RUN = {"data": "abc", "max_new_tokens": 8}
IDS = ["a", 2, "c"]


def write(folder, answers, run=RUN, ids=IDS):
    with AnswerLog(folder, run, ids) as log:
        for answer in answers:
            log.append(answer)


def read(folder, run=RUN, ids=IDS):
    with AnswerLog(folder, run, ids) as log:
        return list(log.answers)


def test_answers_are_kept_one_a_line(tmp_path):
    write(tmp_path / "new/run", ["one", "zwei\n\u2028"])
    lines = (tmp_path / "new/run/answers.jsonl").read_bytes().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"id": "a", "answer": "one"},
        {"id": 2, "answer": "zwei\n\u2028"},
    ]
    write(tmp_path / "new/run", ["three"])
    assert read(tmp_path / "new/run") == ["one", "zwei\n\u2028", "three"]


def test_answers_are_in_the_file_as_soon_as_they_are_given(tmp_path):
    with AnswerLog(tmp_path, RUN, IDS) as log:
        log.append("one")
        assert b"one" in (tmp_path / "answers.jsonl").read_bytes()


@pytest.mark.parametrize("cut", range(1, 26))
def test_a_half_written_line_is_written_again(tmp_path, cut):
    write(tmp_path, ["one", "twö"])
    path = tmp_path / "answers.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    left = read(tmp_path)
    assert left == ["one"]
    write(tmp_path, ["twö"])
    assert path.read_bytes() == whole


@pytest.mark.parametrize("run", [RUN | {"data": "abd"}, RUN | {"max_new_tokens": 9}])
def test_another_run_is_refused(tmp_path, run):
    write(tmp_path, ["one"])
    before = (tmp_path / "answers.jsonl").read_bytes()
    with pytest.raises(
        ValueError, match="holds answers of another run, which differs in"
    ) as caught:
        read(tmp_path, run)
    (key,) = [key for key in RUN if RUN[key] != run[key]]
    assert f"{key} ({RUN[key]} there, {run[key]} now)" in str(caught.value)
    assert (tmp_path / "answers.jsonl").read_bytes() == before
    assert json.loads((tmp_path / "run.json").read_text()) == RUN


def test_a_folder_without_answers_takes_any_run(tmp_path):
    write(tmp_path, [])
    assert read(tmp_path, RUN | {"data": "new"}) == []
    write(tmp_path, ["one"], RUN | {"data": "new"})
    with pytest.raises(ValueError, match="another run"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b'{"id": 2, "ans\n', "is damaged"),
        (b'{"id": 3, "answer": "x"}\n', r"id \(3\) must be 2"),
        (b'{"id": 2, "answer": null}\n', r"answer \(None\) must be a text"),
        (b"7\n", "is damaged"),
    ],
)
def test_damaged_answers(tmp_path, line, error):
    write(tmp_path, ["one"])
    path = tmp_path / "answers.jsonl"
    content = path.read_bytes() + line
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"answers\.jsonl line 2 .*{error}"):
        read(tmp_path)
    assert path.read_bytes() == content


def test_answers_without_their_run(tmp_path):
    write(tmp_path, ["one"])
    for text in ("{", "[]7", "7"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match=r"run\.json cannot be read"):
            read(tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"run\.json cannot be read"):
        read(tmp_path)


def test_an_earlier_start_may_have_gone_further(tmp_path):
    write(tmp_path, ["one", "two", "three"])
    assert read(tmp_path, ids=IDS[:1]) == ["one", "two", "three"]


def test_one_process_at_a_time(tmp_path):
    with (
        AnswerLog(tmp_path, RUN, IDS),
        pytest.raises(ValueError, match="is in use by process"),
    ):
        read(tmp_path)
    assert read(tmp_path) == []
