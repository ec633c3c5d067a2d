import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import tune_tiles
from benchmarks.shapes import LAYERS, SETS
from unimoe_model.precision import multiplies_bf16

ROOT = Path(__file__).parents[2]


def _benchmarks(*options: str, files: tuple[str, ...] = ("benchmarks",)) -> str:
    # A process of its own: the options of benchmarks/conftest.py exist only where pytest starts
    # with that folder.
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *files, *options, "-q", "-p", "no:cacheprovider"],
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
    files = ("benchmarks/bench_moe_layer.py", "benchmarks/bench_swiglu.py")
    printed = _benchmarks("--collect-only", "--shapes", "cpu-goals", files=files)
    collected = [line for line in printed.split("\n") if "::" in line]
    has_bf16 = multiplies_bf16(torch.device("cpu"))
    expected = [case for case in SETS["cpu-goals"].layer if has_bf16 or case.dtype != "bfloat16"]
    assert len(collected) == len(set(collected)) == len(expected)
    assert all("::bench_moe_layer[" in line for line in collected)


def test_the_most_valuable_rows_come_first_and_none_starts_after_the_minutes():
    printed = _benchmarks("--collect-only", "--smoke")
    names = [line.split("::")[1].split("[")[0] for line in printed.split("\n") if "::" in line]
    order = list(dict.fromkeys(names))
    assert order[:3] == ["bench_moe_layer", "bench_topk_router", "bench_permute"]
    assert len(order) == len(list((ROOT / "benchmarks").glob("bench_*.py"))) - 1, "launches"
    printed = _benchmarks("--smoke", "--minutes", "0", "-rs", files=("benchmarks/bench_swiglu.py",))
    assert "the time limit was reached" in printed
    assert " passed" not in printed


def test_tiles_are_tuned_for_the_layers_of_the_goals():
    options = tune_tiles.shapes()
    assert options[:5] == ["--shape", "4096", "11008", "4", "2"]
    named = {tuple(map(int, options[i + 1 : i + 5])) for i in range(0, len(options), 5)}
    assert named == {LAYERS[case.layer] for case in SETS["goals"].layer}
