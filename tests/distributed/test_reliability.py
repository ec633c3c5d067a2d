"""Ranks that die, do not come, or were started otherwise: the rest stop and say why."""

import json
import re
import socket
import subprocess
import sys

import pytest
from kill_ranks import TIMEOUT
from launcher import HERE, launch

from unimoe_kernels.distributed import finish_parallel, start_parallel

# What the message of a rank that is left may say it was doing.
OPERATIONS = {
    "dispatch": "(dispatch|combine) of layers",
    "save": "save of ",
    "start": "start",
}


@pytest.mark.parametrize(
    ("repetitions", "world"), [(1, 2), pytest.param(50, 4, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("mode", OPERATIONS)
def test_a_killed_rank_stops_the_others(tmp_path, mode, repetitions, world):
    script = [sys.executable, HERE / "kill_ranks.py", tmp_path, mode, str(repetitions), str(world)]
    subprocess.run(script, check=True, timeout=3 * TIMEOUT * repetitions)
    results = json.loads((tmp_path / "killed.json").read_text(encoding="utf-8"))
    assert len(results) == repetitions
    for result in results:
        victim = result["victim"]
        assert result["codes"] == [-9 if rank == victim else 1 for rank in range(world)], result
        assert result["seconds"] < TIMEOUT, result
        for rank, text in enumerate(result["texts"]):
            if rank != victim:
                check_message(text, rank, world, victim, OPERATIONS[mode])
        assert result["extra"] == (None if mode == "start" else {"step": 1}), result


def check_message(text, rank, world, victim, operation):
    assert re.search(rf"Error: rank {rank} of {world}: {operation}", text), text
    gone = re.search(r"ranks? ([\d, ]+) died|ranks \[([\d, ]+)\] have not come", text)
    told = re.search(rf"stopped: .*rank {victim}\b", text)
    assert told or str(victim) in re.split(", ", gone[1] or gone[2]), text


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize(
    ("mode", "texts"),
    [
        ("none", [r"\('dp', 'ep'\) \(1, 2\)"] * 2),
        (
            "mesh",
            [
                r"rank 0 of 2: start: rank 1 has other sizes \(data 2, expert 1, processes 2\)",
                r"rank 1 of 2: start: rank 0 has other sizes \(data 1, expert 2, processes 2\)",
            ],
        ),
        (
            "settings",
            [
                r"rank 0 of 2: start: rank 1 has other settings \(other\) than this rank \(same\)",
                r"rank 1 of 2: start: rank 0 has other settings \(same\) than this rank \(other\)",
            ],
        ),
        (
            "world",
            [
                r"rank 0 of 2: start: rank 1 has other sizes \(data 1, expert 3, processes 3\)",
                r"rank 1 of 3: start: rank 0 has other sizes \(data 1, expert 2, processes 2\)",
            ],
        ),
    ],
)
def test_ranks_that_were_started_otherwise_are_named(tmp_path, mode, texts):
    ended = launch("start_ranks.py", 2, tmp_path, mode, free_port(), limit=60)
    assert [end.code for end in ended] == [0, 0], ended
    for rank, text in enumerate(texts):
        assert re.search(text, (tmp_path / f"text{rank}").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"data": 0, "expert": 1}, r"data \(0\) must be at least 1"),
        ({"data": 1, "expert": -2}, r"expert \(-2\) must be at least 1"),
        ({"data": 1, "expert": 1, "timeout": 0}, r"timeout \(0\) must be above 0"),
        ({"data": 1, "expert": 1, "heartbeat": -1}, r"heartbeat \(-1\) must be above 0"),
        (
            {"data": 2, "expert": 3, "rank": 0, "world_size": 4, "init_method": "tcp://a:1"},
            r"data \(2\) times expert \(3\) must be the number of processes \(4\)",
        ),
        ({"data": 1, "expert": 1, "init_method": "tcp://a:1"}, "needs rank and world_size"),
    ],
)
def test_start_refuses_what_cannot_be(arguments, text):
    with pytest.raises(ValueError, match=text):
        start_parallel(**arguments)


def test_start_without_torchrun_says_so(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"RANK.* not set: start the processes with torchrun"):
        start_parallel(1, 1)


def test_finish_without_start_does_nothing():
    finish_parallel()
