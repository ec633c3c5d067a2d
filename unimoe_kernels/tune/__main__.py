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
LISTED_FOR = (90, 132, 227 * 1024)  # an H100, for --list without a GPU


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: Command-line arguments; by default those of the process.

    Returns:
        The exit status: 0 if all problems were measured, 3 if the time limit was reached before
        (the same command resumes), 1 if a kernel broke the GPU's state (the same command resumes)
        or no tile of a problem gave correct results.
    """
    options = _parser().parse_args(arguments)
    if any(least < 1 for shape in options.shape for least in shape):
        raise SystemExit(f"--shape ({options.shape}) must be positive numbers")
    for _, _, experts, top_k in options.shape:
        if top_k > experts:
            raise SystemExit(f"--shape: top_k ({top_k}) must be at most num_experts ({experts})")
    if options.minutes <= 0 or any(count < 1 for count in options.tokens):
        raise SystemExit("--minutes and --tokens must be positive")
    # Whether Triton functions are interpreted or compiled is decided when they are imported.
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
        raise SystemExit("tuning requires a CUDA GPU; --list shows what would be measured")
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
        print(f"\n{error}\nIt is recorded in {options.output}: the same command skips it.")
        return 1
    print(f"\nUNIMOE_TILES={options.output} makes the package use these tiles.")
    if finish.broken:
        print(f"No tile works for {', '.join(map(str, finish.broken))}: see `failed` in the file.")
        return 1
    if not finish.complete:
        print("The time limit was reached: run the same command again to resume.")
        return 3
    return 0


class Progress:
    """Shows a progress bar on a terminal and prints a line for each problem.

    Args:
        total: Number of problems.
        stream: Output stream.
    """

    def __init__(self, total: int, stream: object = sys.stderr):
        self._total, self._done, self._stream = total, 0, stream
        self._begin = time.monotonic()

    def trying(self, case: object, number: int) -> None:
        """Updates the bar, on terminals only."""
        if self._stream.isatty():
            filled = round(20 * self._done / self._total)
            minutes = (time.monotonic() - self._begin) / 60
            bar = f"[{'#' * filled}{'.' * (20 - filled)}] {self._done}/{self._total}"
            line = f"{bar} {minutes:.1f} min  {case}: {number} tiles"
            print(f"\r\x1b[K{line[:118]}", end="", file=self._stream, flush=True)

    def measured(self, case: object, outcome: object) -> None:
        """Prints the outcome of a problem."""
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
        """Prints the reason why a problem was skipped."""
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
        " at least 2 % faster than the default to a table. An interrupted run can be resumed.",
    )
    parser.add_argument("output", type=Path, help="file of the table; an existing one is continued")
    parser.add_argument(
        "--shape",
        nargs=4,
        type=int,
        action="append",
        required=True,
        metavar=("D", "F", "E", "K"),
        help="model width, expert width, experts and top-k of a layer; can be repeated",
    )
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=int,
        default=TOKENS,
        metavar="T",
        help="most important first (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="16-bit dtypes share their tiles (default: %(default)s)",
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
    parser.add_argument(
        "--list", action="store_true", help="list what would be measured; requires no GPU"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
