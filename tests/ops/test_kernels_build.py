"""Every Triton kernel compiles for every supported GPU; none is needed for that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = {
    "count",
    "grouped_mm",
    "grouped_mm_wgrad",
    "grouped_sum",
    "permute",
    "place",
    "swiglu",
    "swiglu_backward",
    "unpermute",
    "unpermute_backward",
}
MATMULS = {"grouped_mm", "grouped_mm_wgrad"}
# Bytes that a block may have, by compute capability.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


@pytest.mark.parametrize(
    "arch",
    [
        80,
        90,
        pytest.param(100, marks=pytest.mark.slow),
        pytest.param(120, marks=pytest.mark.slow),
    ],
)
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
    assert {row["kernel"] for row in rows} == KERNELS
    with capsys.disabled():
        for row in rows:
            tile = "x".join(map(str, row["tile"]))
            print(
                f"\n  sm_{arch} {row['kernel']}[{row['case']}] {tile}: "
                f"{row['registers']} registers, "
                f"{row['spilled']} B spilled, {row['shared']} B shared, "
                f"{' '.join(row['instructions']) or 'no matmul'}",
                end="",
            )
    for row in rows:
        # Outside of loops the compiler may put a few registers aside, to run more blocks at a time.
        assert row["spills_in_loops"] == 0, row
        assert row["spilled"] <= 32, row
        assert row["registers"] <= 255, row
        assert row["shared"] <= SHARED[arch], row
        if row["kernel"] in MATMULS and row["case"] not in ("fp32", "fp64"):
            # On Hopper the fast matrix units take 64 rows or more; fewer go to the older ones.
            fast = row["tile"][0] >= 64 and arch in (90, 100)
            unit = {90: "wgmma", 100: "tcgen05"}[arch] if fast else "mma"
            assert unit in row["instructions"], row
            if row["case"] != "odd":
                assert "cp_async" in row["instructions"], row
