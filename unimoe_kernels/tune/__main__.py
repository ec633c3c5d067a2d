"""The command: `python -m unimoe_kernels.tune OUTPUT --shape D F E K`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import unimoe_kernels

TOKENS = (4096, 16, 32768, 128)
LISTED_FOR = (90, 132, 227 * 1024)  # an H100, where there is no GPU to ask


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: Those of the command line, by default those of the process.

    Returns:
        The exit status: 0 if all problems are measured, 3 if the time was over before (the same
        command goes on from there), 1 if a kernel broke the GPU's state (likewise) or no tile of a
        problem gave the right numbers.
    """
    options = _parser().parse_args(arguments)
    if any(least < 1 for shape in options.shape for least in shape):
        raise SystemExit(f"--shape ({options.shape}) must be positive numbers")
    for _, _, experts, top_k in options.shape:
        if top_k > experts:
            raise SystemExit(f"--shape: top_k ({top_k}) must be at most num_experts ({experts})")
    if options.minutes <= 0 or any(count < 1 for count in options.tokens):
        raise SystemExit("--minutes and --tokens must be positive")
    # Triton's functions are interpreted or compiled from the moment that they are imported.
    from unimoe_kernels._triton.launch import Device, device_of
    from unimoe_kernels.tune.candidates import neighbours
    from unimoe_kernels.tune.cases import PASSES, Shape, cases_of

    shapes = [Shape(*shape) for shape in dict.fromkeys(map(tuple, options.shape))]
    passes = PASSES if options.passes == "both" else (options.passes,)
    cases = cases_of(shapes, options.tokens, getattr(torch, options.dtype), passes)
    if options.list:
        from unimoe_kernels._triton.tiles import analytic

        device = Device(*LISTED_FOR)
        if torch.cuda.is_available():
            device = device_of(torch.empty(0, device="cuda"))
        for case in cases:
            own = analytic(case.problem, device)
            around = len(neighbours(case.problem, own, device))
            print(f"{case}: {_text(own)} and {around} around it")
        return 0
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs a CUDA GPU; --list shows what it would measure")
    return _tune(cases, options)


def _tune(cases: list, options: argparse.Namespace) -> int:
    import triton

    from unimoe_kernels._triton.launch import device_of
    from unimoe_kernels.tune.matmuls import build
    from unimoe_kernels.tune.record import Record
    from unimoe_kernels.tune.search import DeviceLostError, tune
    from unimoe_kernels.tune.timer import CudaTimer

    gpu = torch.device("cuda", torch.cuda.current_device())
    device = device_of(torch.empty(0, device=gpu))
    machine = {
        "gpu": torch.cuda.get_device_name(gpu),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "unimoe_kernels": unimoe_kernels.__version__,
    }
    try:
        record = Record(options.output, device.capability, machine)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    try:
        with torch.no_grad():
            finish = tune(
                cases,
                device,
                lambda case: build(case, gpu),
                CudaTimer(gpu),
                record,
                time.monotonic,
                60 * options.minutes,
                Progress(len(cases)),
                options.jobs,
            )
    except DeviceLostError as error:
        print(f"\n{error}\nIt is noted in {options.output}: the same command goes on past it.")
        return 1
    print(f"\nUNIMOE_TILES={options.output} makes the package use these tiles.")
    if finish.broken:
        print(f"No tile works for {', '.join(map(str, finish.broken))}: see its `failed`.")
        return 1
    if not finish.complete:
        print("The time was over before the end: the same command goes on from here.")
        return 3
    return 0


class Progress:
    """Draws a bar on the terminal, and leaves a line for each problem.

    Args:
        total: Number of problems.
        stream: Where to.
    """

    def __init__(self, total: int, stream: object = sys.stderr):
        self._total, self._done, self._stream = total, 0, stream
        self._begin = time.monotonic()

    def trying(self, case: object, number: int) -> None:
        """Draws the bar; files and pipes get finished lines only."""
        if self._stream.isatty():
            filled = round(20 * self._done / self._total)
            minutes = (time.monotonic() - self._begin) / 60
            bar = f"[{'#' * filled}{'.' * (20 - filled)}] {self._done}/{self._total}"
            line = f"{bar} {minutes:.1f} min  {case}: {number} tiles"
            print(f"\r\x1b[K{line[:118]}", end="", file=self._stream, flush=True)

    def measured(self, case: object, outcome: object) -> None:
        """Leaves a line on what was found."""
        text = f"{1e3 * outcome.seconds:.3f} ms with {_text(outcome.tile)}"
        if outcome.analytic_seconds is None:
            text += f"; the analytic {_text(outcome.analytic)} does not run"
        elif outcome.tile == outcome.analytic:
            text += ", the analytic tile"
        else:
            gain = outcome.analytic_seconds / outcome.seconds - 1
            text += f", {gain:.0%} faster than the analytic {_text(outcome.analytic)}"
        self._line(case, text)

    def skipped(self, case: object, reason: str) -> None:
        """Leaves a line on why there is nothing."""
        self._line(case, reason)

    def _line(self, case: object, text: str) -> None:
        self._done += 1
        start = "\r\x1b[K" if self._stream.isatty() else ""
        print(f"{start}{self._done}/{self._total} {case}: {text}", file=self._stream, flush=True)


def _text(tile: tuple) -> str:
    m, n, k, group, warps, stages, descriptors = tile
    way = "descriptors" if descriptors else "pointers"
    return f"{m}x{n}x{k}/{group} {warps} warps {stages} stages {way}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m unimoe_kernels.tune",
        description="Times tiles of the Triton matmul kernels on this GPU and writes those that are"
        " at least 2 % faster than the default into a table. Cut short it goes on where it was.",
    )
    parser.add_argument(
        "output", type=Path, help="file of the table; one that is there is continued"
    )
    parser.add_argument(
        "--shape",
        nargs=4,
        type=int,
        action="append",
        required=True,
        metavar=("D", "F", "E", "K"),
        help="model width, expert width, experts and experts a token of a layer; can be repeated",
    )
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=int,
        default=TOKENS,
        metavar="T",
        help="the most valuable first (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="16-bit types share their tiles (default: %(default)s)",
    )
    parser.add_argument("--passes", choices=("forward", "backward", "both"), default="both")
    parser.add_argument(
        "--minutes", type=float, default=20.0, help="time to spend (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="tiles to compile at the same time (default: %(default)s)",
    )
    parser.add_argument("--list", action="store_true", help="say what would be measured; no GPU")
    return parser


if __name__ == "__main__":
    sys.exit(main())
