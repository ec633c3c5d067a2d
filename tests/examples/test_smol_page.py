"""The tables of docs/smol.md, and the speed of replies."""

import json

import pytest

from examples.smol import page, reply_speed
from examples.smol.reply_speed import reply_line

EXPERTS = {
    "experts": ["pictures", "text"],
    "routing": {"text": {"per_token": 1.5, "shares": [0.25, 0.75]}},
}


def run(arm, seed, accuracy, after):
    return {
        "arm": arm,
        "seed": seed,
        "machine": "a CPU",
        "tasks": {
            "drawing": {
                "items": 150,
                "accuracy": accuracy,
                "start": 0.0,
                "blind": 0.01,
                "probe": 0.45,
                "top5": 2 * accuracy,
                "probe_top5": 0.64,
            },
            "mixed": {"items": 30, "accuracy": 0.5, "start": 0.0, "blind": 0.1},
        },
        "text": {
            "perplexity": {"manual": {"before": 20.0, "after": after}},
            "chat": [{"prompt": "hello?", "before": "I am " + "very " * 30, "after": "I | am"}],
        },
        **({} if arm == "dense" else EXPERTS),
        "reply": {"first_word": 0.512, "words_per_second": 12.34},
        "stages": {"words": {"seconds": 60, "tokens": 900}, "tune": {"seconds": 90, "tokens": 100}},
    }


@pytest.fixture
def runs(tmp_path):
    own = [run("dense", 0, 0.2, 22), run("moe", 1, 0.3, 21), run("moe", 0, 0.1, 20.5)]
    for number, one in enumerate(own):
        (tmp_path / "results.json").write_text(json.dumps(one))
        added = page.add_run(tmp_path / "results.json", tmp_path / "metrics")
        assert added.name == f"{own[number]['arm']}-{own[number]['seed']}.json"
    return page.read_metrics(tmp_path / "metrics")


def test_tables_have_all_runs(runs):
    assert [(arm, [one["seed"] for one in own]) for arm, own in runs.items()] == [
        ("moe", [0, 1]),
        ("dense", [0]),
    ]
    lines = page.tables(runs).splitlines()
    assert "| task | items | moe, 2 seeds | dense, 1 seed | start | blind | probe |" in lines
    assert "| drawing | 150 | 20.0 ± 14.1 | 20.0 | 0.0 | 1.0 | 45.0 |" in lines
    assert "| mixed | 30 | 50.0 ± 0.0 | 50.0 | 0.0 | 10.0 |  |" in lines
    assert "| drawing | 40.0 ± 28.3 | 40.0 | 64.0 |" in lines
    assert "| manual | 20.00 | 20.75 (+2.5 %, +5.0 %) | 22.00 (+10.0 %) |" in lines
    assert "| tokens | experts | pictures | text |" in lines
    assert "| moe, 2 seeds: text | 1.50 ± 0.00 | 25 | 75 |" in lines
    assert "| moe, seed 1 | 0.51 | 12.3 | 2 | 1,000 | a CPU |" in lines


def test_the_page_is_changed_between_its_comments_only(runs):
    text = f"before\n{page.START}\nold\n{page.END}\nafter"
    found = page.with_tables(text, runs)
    assert found.startswith(f"before\n{page.START}\n\nExact match")
    assert found.endswith(f"\n{page.END}\nafter")
    assert "old" not in found
    assert "hello?\n  SmolLM2: I am very" in found
    assert "  model:   I | am" in found
    assert max(map(len, page.chats(runs["moe"][0]).splitlines())) <= 96
    assert page.with_tables(found, runs) == found
    with pytest.raises(ValueError, match="the page must have <!-- tables"):
        page.with_tables("before", runs)


def test_the_first_picture_is_not_counted(monkeypatch):
    """Each piece takes a second, and each first one as many as its picture's number."""
    now = [0.0]
    monkeypatch.setattr(reply_speed.time, "perf_counter", lambda: now[0])
    replies = {90: ["many ", "words ", "here"], 2: ["a ", "cat ", "sits"], 4: ["a"], 3: ["a ", "b"]}

    def ask(picture):
        now[0] += picture - 1
        for piece in replies[picture]:
            now[0] += 1
            yield piece

    found = reply_speed.reply_speed(ask, list(replies))
    assert found == {"first_word": 3.0, "words_per_second": 1.0}
    assert reply_line(found).endswith("first word after 3.00 s, then 1.0 words per second")
    replies[2] = replies[4] = replies[3] = []
    assert reply_line(reply_speed.reply_speed(ask, list(replies))).endswith(": none has words")
    with pytest.raises(ValueError, match=r"pictures \(1\) must be at least 2"):
        reply_speed.reply_speed(ask, [2])


def test_the_page_is_what_the_committed_metrics_say():
    runs = page.read_metrics()
    assert runs["moe"]
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.with_tables(text, runs) == text
