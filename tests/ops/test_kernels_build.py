"""Every Triton kernel compiles for every supported GPU; none is needed for that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = ("expert_sort.count", "expert_sort.place", "permute", "unpermute", "unpermute.backward")


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_kernels_compile(arch, tmp_path, capsys):
    # Under TRITON_INTERPRET the decorator yields interpreted functions, hence the process.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    root = Path(__file__).parents[2]
    script = Path(__file__).with_name("compile_kernels.py")
    result = subprocess.run(
        [sys.executable, str(script), str(arch)],
        env=environment | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["kernel"].partition("[")[0] for row in rows} == set(KERNELS)
    with capsys.disabled():
        for row in rows:
            print(
                f"\n  sm_{arch} {row['kernel']}: {row['registers']} registers, "
                f"{row['spilled']} B spilled, {row['shared']} B shared",
                end="",
            )
    assert all(row["spilled"] == 0 for row in rows)
    # The least any of these GPUs has for one block, and the most a thread may use.
    assert all(row["shared"] <= 99 * 1024 and row["registers"] <= 255 for row in rows)
