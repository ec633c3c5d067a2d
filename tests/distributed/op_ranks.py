"""What each rank of `test_all_to_all.py` and `test_dispatcher.py` runs: one result a scenario."""

import sys
from pathlib import Path

import all_to_all_scenarios
import dispatch_scenarios
import layer_scenarios
import parallelize_scenarios
import torch
from launcher import write
from op_group import Rank, gathered

from unimoe_kernels.distributed import finish_parallel, start_parallel

SCENARIOS = (
    *all_to_all_scenarios.SCENARIOS,
    *layer_scenarios.SCENARIOS,
    *parallelize_scenarios.SCENARIOS,
    *dispatch_scenarios.SCENARIOS,
)
# What the docstring of `all_to_all` shows.
OF_TWO_RANKS = (all_to_all_scenarios.example,)


def main(folder, rank, world):
    torch.set_num_threads(1)
    mesh = start_parallel(
        1, world, timeout=60, init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    r = Rank(rank, world, mesh)
    results = {}
    for scenario in SCENARIOS + (OF_TWO_RANKS if world == 2 else ()):
        results[scenario.__name__] = gathered(scenario(r), r)
    finish_parallel()
    write(folder, rank, results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
