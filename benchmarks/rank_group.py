"""Processes that run one layer together, controlled through pipes.

`python -m benchmarks.rank_group '<json>'` is one of them.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from unimoe_kernels import SwiGLUFFN
from unimoe_kernels.distributed import (
    Transfer,
    count_traffic,
    finish_parallel,
    parallelize_moe,
    start_parallel,
)
from unimoe_kernels.testing import relative_error

from .candidates import UnavailableError
from .problem import TOLERANCE, Problem
from .shapes import LAYERS, Case

ROOT = Path(__file__).resolve().parents[1]


class RankGroup:
    """`world` processes with gloo that share the experts of a case's layer, and its tokens.

    The machine's threads are divided among them.

    Args:
        case: the case; its tokens are those of all processes together.
        dtype: of weights and inputs.
        world: number of processes.
        chunks: chunks of a dispatch, 1 for no overlap.
        peer: `"deepspeed"` runs DeepSpeed's layer on the same numbers instead of ours.

    Raises:
        UnavailableError: If the peer cannot run.
    """

    def __init__(
        self, case: Case, dtype: torch.dtype, world: int, chunks: int, peer: str = ""
    ) -> None:
        if peer and importlib.util.find_spec(peer) is None:
            raise UnavailableError(f"{peer} is not installed")
        if peer and LAYERS[case.layer].K != 2:
            raise UnavailableError(f"{peer} has the same scores only for two experts per token")
        self._folder = tempfile.TemporaryDirectory()
        threads = max(1, torch.get_num_threads() // world)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        facts = {
            "store": f"file://{self._folder.name}/store",
            "case": case,
            "dtype": str(dtype).removeprefix("torch."),
            "world": world,
            "chunks": chunks,
            "peer": peer,
            "threads": threads,
        }
        self._ranks = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "benchmarks.rank_group",
                    json.dumps(facts | {"rank": rank}),
                ],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]

    def run(self) -> float:
        """Runs the case once; returns the seconds of the slowest process."""
        return max(self.ask("run"))

    def check(self) -> None:
        """Raises AssertionError unless the outputs equal those of one process."""
        for error in self.ask("check"):
            assert error < 1, f"{error:.2g} times the error that rounding explains"

    def profile(self) -> list[dict]:
        """Runs the case once; returns the bytes that each process sent and the time it waited."""
        return self.ask("profile")

    def trace(self, path: Path) -> None:
        """Runs the case once and writes process 0's trace, for chrome://tracing or Perfetto."""
        self.ask(f"trace {path}")

    def ask(self, command: str) -> list:
        """Sends a command to all processes and returns their replies."""
        for rank in self._ranks:
            rank.stdin.write(command + "\n")
            rank.stdin.flush()
        lines = [rank.stdout.readline() for rank in self._ranks]
        if not all(lines):
            raise RuntimeError("a process of the benchmark ended; its error is above")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """Ends the processes."""
        for rank in self._ranks:
            rank.stdin.close()
        for rank in self._ranks:
            rank.wait(timeout=60)
        self._folder.cleanup()


class _Rank:
    """One process: its tokens, and the layer with its experts."""

    def __init__(self, facts: dict) -> None:
        torch.set_num_threads(facts["threads"])
        case = Case(*facts["case"])
        self._training = case.mode == "training"
        self._problem = Problem(case, torch.device("cpu"), getattr(torch, facts["dtype"]))
        rank, world = facts["rank"], facts["world"]
        share = slice(rank * case.tokens // world, (rank + 1) * case.tokens // world)
        self._x = self._problem.x[0, share].contiguous()
        self._grad = self._problem.grad[0, share].contiguous()
        self._clear = self._problem.clear[share]
        y, grad = self._step(self._problem.moe, *self._whole())
        self._expected = [y[share], None if grad is None else grad[share]]
        mesh = start_parallel(
            1, world, init_method=facts["store"], rank=rank, world_size=world, timeout=120
        )
        if facts["peer"]:
            self._moe = deepspeed_layer(self._problem, rank, world)
        else:
            self._moe = parallelize_moe(self._problem.moe, mesh, num_chunks=facts["chunks"])

    def _whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._problem.x[0], self._problem.grad[0]

    def _step(self, moe, x, grad):
        if not self._training:
            with torch.no_grad():
                return moe(x), None
        x = x.detach().requires_grad_()
        moe.zero_grad(set_to_none=True)
        y = moe(x)
        y.backward(grad)
        return y.detach(), x.grad

    def run(self) -> float:
        dist.barrier()
        start = time.perf_counter()
        self._step(self._moe, self._x, self._grad)
        return time.perf_counter() - start

    def check(self) -> float:
        """Returns the largest error, relative to that of rounding."""
        answers = self._step(self._moe, self._x, self._grad)
        limit = TOLERANCE[self._x.dtype]
        return max(
            relative_error(actual[self._clear], expected[self._clear]) / limit
            for actual, expected in zip(answers, self._expected, strict=True)
            if expected is not None
        )

    def profile(self) -> dict:
        wait, waited = Transfer.wait, []

        def timed(transfer, backward):
            start = time.perf_counter()
            try:
                return wait(transfer, backward)
            finally:
                waited.append(time.perf_counter() - start)

        Transfer.wait = timed
        with count_traffic() as traffic:
            seconds = self.run()
        Transfer.wait = wait
        return {"seconds": seconds, "waited": sum(waited), **vars(traffic)}

    def trace(self, path: str) -> None:
        with torch.profiler.profile() as profile:
            self.run()
        if dist.get_rank() == 0:
            profile.export_chrome_trace(path)


def deepspeed_layer(problem: Problem, rank: int, world: int) -> nn.Module:
    """DeepSpeed's layer with this process's experts of the problem; nothing is dropped."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(world)}
    # It writes to the stream that carries the replies.
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed
        from deepspeed.moe.layer import MoE as DeepSpeedMoE

        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        D, F, E, K = problem.layer
        layer = DeepSpeedMoE(
            D,
            SwiGLUFFN(D, F, dtype=problem.x.dtype),
            num_experts=E,
            ep_size=world,
            k=K,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        layer.set_deepspeed_parallelism()
    looped = problem.moe.to_looped()
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(looped.gate.weight)
        for place, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            expert.load_state_dict(looped.experts[rank * (E // world) + place].state_dict())
    return _FirstOutput(layer)


class _FirstOutput(nn.Module):
    """Leaves out the auxiliary loss and the counts."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]


def main() -> None:
    rank = _Rank(json.loads(sys.argv[1]))
    for line in sys.stdin:
        command, *arguments = line.split()
        print(json.dumps(getattr(rank, command)(*arguments)), flush=True)
    finish_parallel()


if __name__ == "__main__":
    main()
