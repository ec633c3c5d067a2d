"""JSON lines that are parsed on access."""

import hashlib
import json
import os

import hypothesis.strategies as st
import pytest
from hypothesis import given
from talks import refusal, talk

from unimoe_model.data.conversations import read_conversations
from unimoe_model.data.json_lines import JsonLines
from unimoe_model.evaluation.files import SizesDigest
from unimoe_model.training import progress
from unimoe_model.training.progress import reported_bytes

ASKED = {"question": "what?", "answer": "x"}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("lines") / "data.jsonl"


@given(
    rows=st.lists(
        st.one_of(
            st.sampled_from(["", " ", "\t", "\u00a0"]),
            st.text(" é\u2028\u0085x\n", min_size=1, max_size=5).map(lambda t: talk(f"q{t}", "r")),
        ),
        max_size=12,
    ),
    end=st.sampled_from(["\n", "\r\n"]),
    mark=st.booleans(),
)
def test_any_line_is_found_in_any_order(file, rows, end, mark):
    rows.append(talk("last", "r"))
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_bytes((b"\xef\xbb\xbf" if mark else b"") + end.join(lines).encode())
    expected = [
        (f"{file} line {number}", row["conversations"][0]["value"])
        for number, row in enumerate(rows, start=1)
        if isinstance(row, dict)
    ]
    samples = read_conversations(file)
    assert len(samples) == len(expected)
    for index in reversed(range(len(expected))):
        assert (samples[index].where, samples[index].turns[0][0]) == expected[index]
    assert samples[-1].turns == (("last", "r"),)
    assert len(list(samples)) == len(expected)


def test_nothing_is_kept_of_a_line(file):
    file.write_text("".join(json.dumps(talk(f"q{n}", "r")) + "\n" for n in range(100)))
    lines = JsonLines(file, lambda name: name)
    assert [found.id for found in lines.scanned(lambda count: None)] == list(range(1, 101))
    kept = [value for value in vars(lines).values() if isinstance(value, list | tuple | dict)]
    assert not kept
    assert lines._starts.nbytes + lines._lines.nbytes <= 16 * 101
    assert lines(7) == lines(7)
    assert lines(7) is not lines(7)


def test_each_line_is_parsed_once_by_the_check(file, monkeypatch):
    file.write_text("".join(json.dumps({"id": n, **ASKED}) + "\n" for n in range(100)))
    own, parsed = json.loads, []
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or own(text))
    samples = read_conversations(file)
    assert len(parsed) == 100
    assert samples[5].id == 5


def test_the_first_of_several_equal_ids_is_named(write_talks):
    ids = ["a", 3, "b", "3", 3, "b"]
    lines = "\n\n".join(json.dumps({"id": name, **ASKED}) for name in ids)
    assert refusal(write_talks(lines, "data.jsonl")) == (
        "data.jsonl line 7: id ('3') must be unique; line 3 has it too"
    )


def test_ids_of_one_hash_are_told_apart(write_talks, monkeypatch):
    monkeypatch.setattr("unimoe_model.data.json_lines.hash", lambda name: 1, raising=False)
    lines = [json.dumps({"id": name, **ASKED}) for name in "abcd"]
    assert len(read_conversations(write_talks("\n".join(lines), "data.jsonl"))) == 4
    path = write_talks("\n".join([*lines, lines[1]]), "data.jsonl")
    assert refusal(path).endswith("line 5: id ('b') must be unique; line 2 has it too")


def test_a_file_that_changes_while_it_is_read_is_refused(file):
    file.write_text(json.dumps(talk("q", "r")))
    samples = read_conversations(file)
    os.utime(file, ns=(1, 1))
    with pytest.raises(ValueError, match=r"data\.jsonl\) has changed since it was read"):
        samples[0]


def test_digest_of_sizes_takes_paths_one_by_one(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x").write_bytes(b"xyz")
    digest = SizesDigest()
    paths = [tmp_path / name for name in ("a", "d", "a", "b")]
    for path in paths:
        digest.add(path)
    sizes = [[("a", 1)], [("x", 3)], [("a", 1)], [("b", 1)]]
    assert digest.hexdigest() == hashlib.sha256(repr(sizes).encode()).hexdigest()[:16]


class Told:
    def __init__(self):
        self.said = []

    def start(self, stage, total, done):
        self.said.append((stage, total, done))

    def advance(self, steps, **figures):
        self.said.append(steps)

    def finish(self):
        self.said.append("end")


def test_progress_of_long_files_is_reported_in_mebibytes(monkeypatch):
    told = Told()
    with reported_bytes(told, "check", 100) as advance:
        advance(100)
    assert told.said == []
    monkeypatch.setattr(progress, "_REPORTED_BYTES", 1)
    with reported_bytes(told, "check", 3 << 20) as advance:
        for count in (1 << 19, 1 << 19, 1, 2 << 20):
            advance(count)
    assert told.said == [("check, MiB", 3, 0), 1, 2, "end"]


def test_the_check_of_a_file_reports_its_bytes(file, monkeypatch):
    monkeypatch.setattr(progress, "_REPORTED_BYTES", 1)
    file.write_text("".join(json.dumps(talk("q" * 1000, "r")) + "\n" for n in range(3000)))
    told = Told()
    read_conversations(file, reporter=told)
    assert told.said[0] == ("check data.jsonl, MiB", file.stat().st_size >> 20, 0)
    assert sum(told.said[1:-1]) == told.said[0][1] > 1
