"""Starts the ranks of a test as processes of their own, and reads what they found."""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Ended(NamedTuple):
    code: int | None
    output: str


def launch(script, world, folder, *arguments, limit=300):
    """Runs `script FOLDER RANK WORLD ARGUMENTS` on every rank; returns how each of them ended.

    Args:
        script: its path, or its name in the folder of this file.
        limit: seconds after which all ranks are killed, with None for their exit codes.
    """
    server = _server()
    with tempfile.TemporaryDirectory() as outputs:
        files = [f"{outputs}/{rank}" for rank in range(world)]
        request = {
            "script": str(HERE / script),
            "arguments": [
                [str(folder), str(rank), str(world), *map(str, arguments)] for rank in range(world)
            ],
            "environment": _environment(),
            "outputs": files,
            "limit": limit,
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        reply = server.stdout.readline()
        if not reply:
            _server.cache_clear()
            raise RuntimeError(f"rank_server.py ended with exit code {server.wait()}")
        codes = json.loads(reply)
        texts = [Path(file).read_text(encoding="utf-8") for file in files]
    hung = f"\nstill ran after {limit} s"
    return [Ended(c, t + hung * (c is None)) for c, t in zip(codes, texts, strict=True)]


def found(script, world, folder, *arguments, limit=300):
    """Runs ranks that must all succeed, and returns what rank 0 wrote with `write`."""
    ended = launch(script, world, folder, *arguments, limit=limit)
    texts = "\n".join(f"--- rank {rank}\n{end.output}" for rank, end in enumerate(ended))
    assert [end.code for end in ended] == [0] * world, texts
    return json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))


def write(folder, rank, result):
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(result), encoding="utf-8")


@functools.cache
def _server():
    """The process that ranks are forked from; it ends with this one."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "rank_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(),
    )
    atexit.register(process.kill)
    return process


def _environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
