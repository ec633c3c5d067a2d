"""Which committed results a run is compared with."""

import json

from benchmarks import history


def result(of_class, date, **ratios):
    rows = [{"key": key, "ratio": ratio} for key, ratio in ratios.items()]
    return json.dumps({"machine": {"class": of_class}, "date": date, "rows": rows})


def test_rows_of_several_files_are_put_together_and_the_newest_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "ROOT", tmp_path)
    monkeypatch.setattr(history, "FOLDER", tmp_path)
    (tmp_path / "a.json").write_text(result("here", "2026-02-02T10:00", old=1, both=2))
    (tmp_path / "b.json").write_text(result("here", "2026-02-03T10:00", both=3, new=4))
    (tmp_path / "c.json").write_text(result("elsewhere", "2026-02-04T10:00", both=5, other=6))
    # What a killed run left of a file is hidden.
    (tmp_path / ".d.0123.tmp.json").write_text("{")
    source, rows = history.committed_rows("here")
    assert source == "b.json"
    assert {key: row["ratio"] for key, row in rows.items()} == {"old": 1, "both": 3, "new": 4}
    assert history.committed_rows("nowhere") == ("", {})
