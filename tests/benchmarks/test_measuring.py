"""The parts that measure, on functions that need no clock."""

import itertools
import json

import pytest
import torch

from benchmarks import history, visits
from benchmarks.candidates import Candidate, UnavailableError, Work, in_turns
from benchmarks.limits import Limits, best_of
from benchmarks.memory import peak_extra_bytes, saved_bytes
from benchmarks.recorder import LimitsOfTime, Recorder, checked, revisited, set_shares
from benchmarks.shapes import SETS, Case, every_case
from benchmarks.time_limit import within
from benchmarks.timing import time_in_turns

CPU = torch.device("cpu")


def test_functions_take_turns_in_an_order_that_rotates():
    calls = []
    functions = {name: lambda name=name: calls.append(name) or 1.0 for name in "abc"}
    timings, rounds = time_in_turns(functions, "a", CPU, seconds=0, min_rounds=3)
    assert rounds == 3
    assert "".join(calls).endswith("abcbcacab")
    assert {name: timing.ratio for name, timing in timings.items()} == dict.fromkeys("abc", 1.0)


def test_ratios_are_taken_within_a_round():
    warm_up = [1.0] * 3
    times = {
        "dense": iter([*warm_up, 1.0, 10.0, 100.0]),
        "ours": iter([*warm_up, 2.0, 20.0, 200.0]),
    }
    functions = {name: lambda own=own: next(own) for name, own in times.items()}
    timings, _ = time_in_turns(functions, "dense", CPU, seconds=0, min_rounds=3)
    assert timings["ours"].ratio == 2.0
    assert timings["ours"].noise == 0.0


def test_the_slowest_take_part_less_often():
    counts = {"dense": 0, "slow": 0}

    def count(name, seconds):
        counts[name] += 1
        return seconds

    functions = {"dense": lambda: count("dense", 1.0), "slow": lambda: count("slow", 60.0)}
    timings, _ = time_in_turns(functions, "dense", CPU, seconds=0, min_rounds=8)
    assert (counts["dense"], counts["slow"]) == (3 + 8, 3 + 2)
    assert timings["slow"].ratio == 60.0


def test_a_visit_times_the_anchor_and_ours(monkeypatch):
    monkeypatch.setenv("UNIMOE_BENCH_SLOW", "other:9")
    given = {
        "dense": lambda: Candidate(run=lambda: 1.0),
        "peer": lambda: pytest.fail("a visit must not make it"),
        "ours": lambda: Candidate(run=lambda: 3.0),
    }
    assert revisited("permute", given, "dense", CPU) == 3.0


def forever():
    while True:
        pass


def test_a_provider_that_is_not_ready_in_time_is_left_out():
    given = {
        "dense": lambda: Candidate(run=lambda: 1.0),
        "autotunes": lambda: Candidate(run=lambda: 1.0, check=forever),
        "ours": lambda: Candidate(run=lambda: 1.0),
    }
    candidates, unavailable = checked(given, ready=0.01)
    assert list(candidates) == ["dense", "ours"]
    assert unavailable == {"autotunes": "it was not ready within 0.01 s"}
    # The alarm is off again, and what rang before rings again.
    for _ in range(10**5):
        pass
    with pytest.raises(UnavailableError), within(0.01):
        forever()


def test_a_peer_whose_row_would_take_too_long_is_left_out():
    given = {
        "dense": lambda: Candidate(run=lambda: 12.0),
        "slow": lambda: Candidate(run=lambda: 11.0),
        "slower": lambda: Candidate(run=forever),
        "ours": lambda: Candidate(run=lambda: 13.0),
    }
    recorder = Recorder(
        CPU, Limits({}, 0, 0), seconds=0, limits_of_time=LimitsOfTime(ready=0.01, rounds=30)
    )
    row, _ = recorder.measure("permute", Case("host", 4), torch.float32, given, Work(0, 1))
    assert list(row["providers"]) == ["dense", "ours"]
    assert row["unavailable"] == {
        "slow": "its part of the row would take 33 s, more than 30 s",
        "slower": "it was not ready within 0.01 s",
    }


def test_calls_take_turns_on_shared_memory():
    calls, turns = [], itertools.count()
    mine, yours = (
        in_turns([Candidate(run=lambda i=i: calls.append(i)) for i in range(3)], turns)
        for _ in range(2)
    )
    for candidate in (mine, yours, yours, mine, yours):
        candidate.run()
    assert calls == [0, 1, 2, 0, 1]


def test_visits_are_added_to_their_rows(monkeypatch, tmp_path):
    answers = iter([1.2, 1.0, 1.4, 1.1])
    monkeypatch.setattr(
        visits, "_in_fresh_process", lambda anchors, shapes: dict.fromkeys(anchors, next(answers))
    )
    row = {"key": "a", "anchor": "dense", "visits": [1.3], "providers": {"ours": {"ratio": 1.3}}}
    said = []
    visits.visit([row], 4, "small", said.append)
    assert row["visits"] == [1.3, 1.2, 1.0, 1.4, 1.1]
    assert row["providers"]["ours"]["ratio"] == 1.2
    assert row["providers"]["ours"]["noise"] == visits.noise_of_visits(row["visits"])
    assert len(said) == 4

    path = tmp_path / "visit.json"
    path.write_text(json.dumps({"a": "dense"}))
    visits.VisitFile(path).add("a", 1.25)
    assert visits.VisitFile(path).ratios() == {"a": 1.25}


def test_peak_and_kept_memory_are_counted():
    x = torch.randn(256, 1024)
    size = x.numel() * 4
    assert peak_extra_bytes(lambda: (x + 1).mul(2).sum(), CPU) == pytest.approx(2 * size, rel=0.01)
    weight = torch.randn(1024, 1024, requires_grad=True)
    kept = saved_bytes(lambda: (x @ weight).exp(), [weight])
    assert kept == 2 * size


def test_wrong_answers_stop_a_row_and_missing_peers_do_not():
    def missing():
        raise UnavailableError("not here")

    def wrong():
        raise AssertionError("wrong output")

    good = Candidate(run=lambda: None)
    candidates, unavailable = checked({"ours": lambda: good, "peer": missing})
    assert list(candidates) == ["ours"]
    assert unavailable == {"peer": "not here"}
    with pytest.raises(AssertionError, match="wrong output"):
        checked({"ours": lambda: Candidate(run=lambda: None, check=wrong)})


def test_a_row_holds_what_the_table_shows(monkeypatch):
    monkeypatch.setenv("UNIMOE_BENCH_SLOW", "other:9")
    limits = Limits({"float32": 4e9}, read=1e9, copy=1e9)
    recorder = Recorder(CPU, limits, seconds=0)
    providers = {
        "dense": lambda: Candidate(run=lambda: 1.0),
        "ours": lambda: Candidate(run=lambda: 2.0, forward=lambda: None),
    }
    row, _ = recorder.measure("permute", Case("olmoe", 4), torch.float32, providers, Work(4e9, 1e8))
    assert row["key"] == "permute[olmoe-T4-forward-natural]"
    ours = row["providers"]["ours"]
    assert (ours["ratio"], ours["rate"], row["unit"]) == (2.0, 2.0, "GFLOP/s")
    assert ours["share_of_limit"] == 0.5
    assert {"peak_extra_bytes", "saved_bytes"} <= ours.keys()
    assert json.loads(json.dumps(row)) == row
    work = Work(1e6, 1e9)
    by_memory, _ = recorder.measure("permute", Case("olmoe", 4), torch.float32, providers, work)
    assert by_memory["unit"] == "GB/s"


def test_results_are_kept_row_by_row_and_resumed(tmp_path):
    path = tmp_path / "results" / "a.json"
    limits = vars(Limits({"float32": 4.0}, read=3.0, copy=2.0))
    head = {"commit": "abc", "machine": {"class": "m"}, "commands": ["a"], "limits": limits}
    history.ResultsFile(path, head).add({"key": "x"})
    again = history.ResultsFile(path, head | {"commands": ["b"]})
    assert set(again.rows) == {"x"}
    again.add({"key": "y"})
    held = json.loads(path.read_text())
    assert [row["key"] for row in held["rows"]] == ["x", "y"]
    assert held["commands"] == ["a", "b"]
    assert not history.ResultsFile(path, head | {"commit": "other"}).rows
    assert not history.ResultsFile(path, head | {"commit": "abc+"}).rows
    assert list(path.parent.iterdir()) == [path]


def test_shares_are_of_the_best_limits_seen(tmp_path):
    path = tmp_path / "a.json"
    slow, fast = (Limits({"float32": rate}, read=1e9, copy=1e9) for rate in (2e9, 4e9))
    head = {"commit": "abc", "machine": {"class": "m"}, "commands": [], "limits": vars(fast)}
    row = {
        "key": "x",
        "dtype": "float32",
        "work": {"flops": 4e9, "bytes": 1.0},
        "providers": {"ours": {"median_ms": 4000.0}},
    }
    history.ResultsFile(path, head).add(row)
    again = history.ResultsFile(path, head | {"limits": vars(slow)})
    assert again.limits == best_of(slow, fast) == fast
    set_shares(row, slow)
    assert row["providers"]["ours"]["share_of_limit"] == 0.5
    set_shares(row, again.limits)
    again.finish(again.limits, [row])
    held = json.loads(path.read_text())
    assert held["limits"] == vars(fast)
    assert held["rows"][0]["providers"]["ours"]["share_of_limit"] == 0.25


def test_a_result_names_no_host_and_no_folder():
    facts = json.dumps(history.machine(CPU))
    assert "/" not in facts.replace("torch", "")
    assert history.machine_class(CPU) == history.machine(CPU)["class"]
    assert str(torch.get_num_threads()) in history.machine_class(CPU)


def test_case_names_are_unique_and_sets_hold_cases():
    for name in SETS:
        layer = [str(case) for case in SETS[name].layer]
        assert len(set(layer)) == len(layer)
        assert bool(layer) == (name not in ("ranks", "host", "quantized"))
        assert every_case(name)
