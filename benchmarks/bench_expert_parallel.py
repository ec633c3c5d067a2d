"""A layer with its experts in 2 and 4 processes (gloo), compared with one process.

`python -m benchmarks.bench_expert_parallel` prints additional figures: the time spent waiting for
transfers, and the bytes sent compared with the formula in docs/expert_parallelism.md.
"""

import argparse
import atexit
from pathlib import Path

import torch

from unimoe_kernels import SwiGLUFFN

from .candidates import Candidate
from .problem import Problem
from .rank_group import RankGroup
from .shapes import SETS, Case

CHUNKS = 2


def bench_expert_parallel(record, ranks_case, device, dtype):
    problem = Problem(ranks_case, torch.device("cpu"), dtype)
    groups: list[RankGroup] = []

    def processes(world: int, chunks: int, peer: str = "") -> Candidate:
        group = RankGroup(ranks_case, dtype, world, chunks, peer)
        groups.append(group)
        atexit.register(group.close)
        return Candidate(run=group.run, check=group.check, in_process=False)

    def dense() -> Candidate:
        D, F, _, K = problem.layer
        return problem.candidate("dense", SwiGLUFFN(D, K * F, dtype=dtype), comparable=False)

    candidates = {
        "dense": dense,
        "one-process": lambda: problem.candidate("one-process", problem.moe),
        "ours": lambda: processes(2, CHUNKS),
    }
    # In a smoke run, starting eight processes would take most of the time.
    if ranks_case not in SETS["smoke"].ranks:
        candidates |= {
            "ours-no-overlap": lambda: processes(2, 1),
            "ours-4-processes": lambda: processes(4, CHUNKS),
            "deepspeed": lambda: processes(2, 1, "deepspeed"),
        }
    try:
        record(ranks_case, candidates, problem.work)
    finally:
        for group in groups:
            atexit.unregister(group.close)
            group.close()


def formula_bytes(case: Case, world: int, dtype: torch.dtype) -> int:
    """Bytes of rows that all processes send in a forward: rows to other ranks, and their outputs.

    The backward sends the same number again.
    """
    problem = Problem(case, torch.device("cpu"), dtype)
    D, _, E, _ = problem.layer
    with torch.no_grad():
        ids_TK = problem.moe.router(problem.x).ids
    token_T = torch.arange(case.tokens)
    starts = torch.tensor([rank * case.tokens // world for rank in range(world + 1)])
    own_T = torch.bucketize(token_T, starts[1:], right=True)
    leaves = int((ids_TK // (E // world) != own_T[:, None]).sum())
    passes = 2 if case.mode == "training" else 1
    return passes * 2 * leaves * D * torch.empty(0, dtype=dtype).element_size()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", choices=SETS, default="ranks")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--trace", type=Path, help="writes a trace of 2 processes with overlap")
    options = parser.parse_args()
    print("case, processes, chunks: median ms, waiting for transfers, bytes sent by all (formula)")
    for case in SETS[options.shapes].ranks:
        groups = {
            (world, chunks): RankGroup(case, torch.float32, world, chunks)
            for world in options.processes
            for chunks in (1, CHUNKS)
        }
        for group in groups.values():
            group.check()
        # Interleaved, so that a slow second of the machine affects all of them.
        rounds = [
            {key: group.profile() for key, group in groups.items()} for _ in range(options.rounds)
        ]
        seconds = {
            key: torch.tensor([max(rank["seconds"] for rank in each[key]) for each in rounds])
            for key in groups
        }
        for (world, chunks), group in groups.items():
            runs = [each[world, chunks] for each in rounds]
            shares = [rank["waited"] / rank["seconds"] for run in runs for rank in run]
            sent = {sum(rank["sent"] for rank in run) for run in runs}
            print(
                f"{case}, {world}, {chunks}: {1e3 * seconds[world, chunks].median():.2f} ms,"
                f" {100 * torch.tensor(shares).median():.0f} %, {sorted(sent)}"
                f" ({formula_bytes(case, world, torch.float32)})"
            )
            if options.trace is not None and (world, chunks) == (2, CHUNKS):
                group.trace(options.trace.resolve())
        for world in options.processes:
            ratios = seconds[world, CHUNKS] / seconds[world, 1]
            low, middle, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
            print(
                f"{case}, {world}: {CHUNKS} chunks take {middle:.3f} of the time of one, round by"
                f" round (quartiles {low:.3f} to {high:.3f})"
            )
        for group in groups.values():
            group.close()


if __name__ == "__main__":
    main()
