import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_benchmark_runs_at_its_smallest_size():
    # A process of its own: the options of benchmarks/conftest.py exist only where pytest starts
    # with that folder.
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--smoke", "-q", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=os.environ | {"UNIMOE_BENCH_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
