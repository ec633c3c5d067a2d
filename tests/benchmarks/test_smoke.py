import os
import subprocess
import sys
from pathlib import Path

from benchmarks.shapes import SETS

ROOT = Path(__file__).parents[2]


def _benchmarks(*options: str) -> str:
    # A process of its own: the options of benchmarks/conftest.py exist only where pytest starts
    # with that folder.
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", *options, "-q", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=os.environ | {"UNIMOE_BENCH_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_every_benchmark_runs_at_its_smallest_size():
    assert " passed" in _benchmarks("--smoke")


def test_a_benchmark_without_cases_in_a_set_is_left_out():
    collected = [
        line
        for line in _benchmarks("--collect-only", "--shapes", "cpu-goals").split("\n")
        if "::" in line
    ]
    assert len(collected) == len(set(collected)) == len(SETS["cpu-goals"].layer)
    assert all("::bench_moe_layer[" in line for line in collected)
