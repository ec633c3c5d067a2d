"""Measured limits of the machine: FLOP/s by dtype, and memory bandwidth.

A CPU is measured by `limits.c`, compiled for the processor at run time, a GPU by large matmuls and
copies in torch.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = (torch.float32, torch.bfloat16)
ROUNDS = 7
MEMORY_BYTES = 1 << 29
"""Size of the arrays that are read and copied: larger than any cache."""


@dataclass(frozen=True)
class Limits:
    """Highest measured rates.

    Attributes:
        flops: floating-point operations per second, by dtype name.
        read: bytes per second read from memory.
        copy: bytes per second of a copy, read and written together.
        missing: reason why a figure could not be measured, or "".
    """

    flops: dict[str, float]
    read: float
    copy: float
    missing: str = ""

    def least_seconds(self, flops: float, bytes_moved: float, dtype: str) -> float:
        """Minimum time of work, by arithmetic or by memory; 0 if neither was measured."""
        peak = self.flops.get(dtype, 0)
        seconds = [flops / peak] if peak else []
        return max([*seconds, bytes_moved / self.read] if self.read else seconds, default=0.0)


def best_of(*limits: Limits) -> Limits:
    """The maximum of each rate, because other programs can only reduce it."""
    names = dict.fromkeys(name for one in limits for name in one.flops)
    return Limits(
        {name: max(one.flops.get(name, 0.0) for one in limits) for name in names},
        max(one.read for one in limits),
        max(one.copy for one in limits),
        limits[-1].missing,
    )


def name_of(dtype: torch.dtype) -> str:
    """`"float32"` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def measure_limits(device: torch.device) -> Limits:
    """Takes the best of several rounds, in about two seconds."""
    return _gpu_limits(device) if device.type == "cuda" else _cpu_limits()


def _cpu_limits() -> Limits:
    copied = torch.ones(MEMORY_BYTES // 4)
    target = torch.empty_like(copied)
    seconds = min(_seconds(lambda: target.copy_(copied)) for _ in range(ROUNDS))
    copy = 2 * MEMORY_BYTES / seconds
    with tempfile.TemporaryDirectory() as folder:
        try:
            library = _compile(Path(folder))
        except RuntimeError as error:
            return Limits({}, 0.0, copy, missing=str(error))
        flops = {
            name_of(dtype): _rate_of_all_threads(
                functools.partial(getattr(library, f"{name_of(dtype)}_flops"), 1_000_000)
            )
            for dtype in DTYPES
        }
        address, count = copied.data_ptr(), copied.numel() // torch.get_num_threads() // 128 * 128
        starts = iter([address + 4 * count * i for i in range(torch.get_num_threads())] * ROUNDS)
        read = _rate_of_all_threads(lambda out: library.read_bytes(next(starts), count, out))
    return Limits({name: rate for name, rate in flops.items() if rate}, read, copy)


def _compile(folder: Path) -> ctypes.CDLL:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("peak and read bandwidth require a C compiler, and none was found")
    target = folder / "limits.so"
    source = Path(__file__).with_name("limits.c")
    native = ["-mcpu=native"] if os.uname().machine == "aarch64" else ["-march=native"]
    flags = ["-O3", *native, "-ffp-contract=fast", "-shared", "-fPIC"]
    result = subprocess.run(
        [compiler, *flags, str(source), "-o", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"peak and read bandwidth: {compiler} failed: {result.stderr.strip()}")
    library = ctypes.CDLL(str(target))
    out = ctypes.POINTER(ctypes.c_float)
    for dtype in DTYPES:
        function = getattr(library, f"{name_of(dtype)}_flops")
        function.argtypes, function.restype = [ctypes.c_int64, out], ctypes.c_double
    library.read_bytes.argtypes = [ctypes.c_void_p, ctypes.c_int64, out]
    library.read_bytes.restype = ctypes.c_double
    return library


def _rate_of_all_threads(function: Callable[..., float]) -> float:
    """Best rate of `function(out)`, which returns its work, on as many threads as torch uses."""
    threads = torch.get_num_threads()
    rates = []
    for _ in range(ROUNDS):
        done = [0.0] * threads

        def work(index: int, done: list[float] = done) -> None:
            out = ctypes.c_float(1.0)
            done[index] = function(ctypes.byref(out))

        workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        rates.append(sum(done) / (time.perf_counter() - start))
    return max(rates)


def _gpu_limits(device: torch.device) -> Limits:
    size = 8192
    flops = {}
    for dtype in DTYPES:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds = min(_seconds(lambda a=a, b=b: a @ b, device) for _ in range(ROUNDS))
        flops[name_of(dtype)] = 2 * size**3 / seconds
    copied = torch.ones(2 * MEMORY_BYTES // 4, device=device)
    target = torch.empty_like(copied)
    copy = min(_seconds(lambda: target.copy_(copied), device) for _ in range(ROUNDS))
    read = min(_seconds(copied.sum, device) for _ in range(ROUNDS))
    return Limits(flops, 2 * MEMORY_BYTES / read, 4 * MEMORY_BYTES / copy)


def _seconds(function: Callable[[], object], device: torch.device | None = None) -> float:
    if device is None:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    function()
    events[0].record()
    function()
    events[1].record()
    torch.cuda.synchronize(device)
    return events[0].elapsed_time(events[1]) / 1e3
