"""Kills one of several ranks, many times: `kill_ranks.py FOLDER MODE REPETITIONS WORLD`.

Ranks are forked, so that torch is imported once. Which rank dies, and after how many transfers,
files or steps of the start, changes from one repetition to the next. Each rank that is left writes
what it ended with; the driver prints a line a repetition.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from small_model import SmallModel, batch, loss_of
from torch.distributed.checkpoint import FileSystemWriter

from unimoe_kernels.distributed import (
    attributed,
    count_over_ranks,
    finish_parallel,
    load_sharded,
    parallelize_moe,
    parameter_groups,
    save_sharded,
    start_parallel,
)
from unimoe_kernels.distributed.dispatch.all_to_all import Transfer

TIMEOUT = 20.0
START_TIMEOUT = 2.0
# Transfers of a step of `SmallModel`: 2 layers, forth and back, and the same in the backward.
TRANSFERS = 8


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(owner, name, number):
    """Kills this process when a method of a class is called for the `number`-th time."""
    method, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            die()
        return method(*args, **kwargs)

    setattr(owner, name, wrapped)


def step(model, optimizer, mesh, rank, number):
    inputs = batch(rank, number, "natural")
    optimizer.zero_grad()
    loss_of(model, inputs, count_over_ranks((inputs[2] >= 0).sum(), mesh))[0].backward()
    optimizer.step()


def work(folder, rank, world, mode, repetition, init_method):
    victim = rank == repetition % world
    timeout = START_TIMEOUT if mode == "start" else TIMEOUT
    if victim and mode == "start":
        if repetition % 4 < 2:
            die()
        die_at(torch.distributed, "init_process_group", 1)
    mesh = start_parallel(
        1,
        world,
        timeout=timeout,
        heartbeat=0.1,
        init_method=init_method,
        rank=rank,
        world_size=world,
    )
    model = parallelize_moe(SmallModel(), mesh)
    optimizer = torch.optim.AdamW(parameter_groups(model.parameters()), lr=1e-2)
    with attributed("step 0 of the test"):
        step(model, optimizer, mesh, rank, 0)
    save_sharded(folder / "checkpoint", model, [optimizer], {"step": 1})
    if victim and mode == "dispatch":
        die_at(Transfer, "send", 1 + repetition % TRANSFERS)
    with attributed("step 1 of the test"):
        step(model, optimizer, mesh, rank, 1)
    if victim and mode == "save":
        die_at(FileSystemWriter, ("prepare_local_plan", "write_data")[repetition % 2], 1)
    save_sharded(folder / "checkpoint", model, [optimizer], {"step": 2})
    finish_parallel()


def run(folder, rank, world, mode, repetition, init_method):
    try:
        work(folder, rank, world, mode, repetition, init_method)
        text, code = "finished", 0
    except (RuntimeError, ValueError) as error:
        text, code = f"{type(error).__name__}: {error}", 1
    (folder / f"rank{rank}.txt").write_text(text, encoding="utf-8")
    return code


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def repetition_of(folder, world, mode, repetition):
    folder.mkdir()
    init_method = f"file://{folder}/store"
    if repetition % 2:
        init_method = f"tcp://127.0.0.1:{free_port()}"
    started, children = time.monotonic(), {}
    for rank in range(world):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            # By the normal way out, which must not wait for anybody either.
            sys.exit(run(folder, rank, world, mode, repetition, init_method))
        children[child] = rank
    codes = {}
    while children and time.monotonic() - started < 3 * TIMEOUT:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[children.pop(child)] = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.01)
    for child, rank in children.items():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        codes[rank] = "hung"
    extra = None
    if mode != "start":
        extra = load_sharded(folder / "checkpoint", SmallModel())
    return {
        "victim": repetition % world,
        "codes": [codes[rank] for rank in range(world)],
        "texts": [_text(folder / f"rank{rank}.txt") for rank in range(world)],
        "extra": extra,
        "seconds": time.monotonic() - started,
    }


def _text(path):
    return path.read_text(encoding="utf-8") if path.exists() else None


def main(folder, mode, repetitions, world):
    results = [
        repetition_of(folder / f"{mode}{number}", world, mode, number)
        for number in range(repetitions)
    ]
    (folder / "killed.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
