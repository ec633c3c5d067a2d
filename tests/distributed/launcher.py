"""Starts the ranks of a test as processes of their own, and reads what they found."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Ended(NamedTuple):
    code: int
    output: str


def launch(script, world, folder, *arguments, limit=300):
    """Runs `script FOLDER RANK WORLD ARGUMENTS` on every rank; returns how each of them ended.

    All are killed once `limit` seconds have passed: a rank that hangs fails its test.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, HERE / script, folder, str(rank), str(world), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(world)
    ]
    try:
        return [Ended(p.returncode, text) for p in processes for text in [_text(p, limit)]]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _text(process, limit):
    try:
        return process.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return f"{process.communicate()[0]}\nstill ran after {limit} s"


def found(script, world, folder, *arguments, limit=300):
    """Runs ranks that must all succeed, and returns what rank 0 wrote with `write`."""
    ended = launch(script, world, folder, *arguments, limit=limit)
    texts = "\n".join(f"--- rank {rank}\n{end.output}" for rank, end in enumerate(ended))
    assert [end.code for end in ended] == [0] * world, texts
    return json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))


def write(folder, rank, result):
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(result), encoding="utf-8")
