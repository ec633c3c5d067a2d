"""Every Triton kernel compiles for every supported GPU; none is needed for that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import kernels

KERNELS = {kernels.short_name(kernel) for kernel in kernels.kernels()}
MATMULS = {kernels.short_name(kernel) for kernel in kernels.kernels() if kernels.multiplies(kernel)}
DESCRIBED = {
    kernels.short_name(kernel) for kernel in kernels.kernels() if kernels.takes_descriptors(kernel)
}
# Bytes that a block may have, by compute capability.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


def run_script(tmp_path, *arguments):
    """Runs `compile_kernels.py` and returns the rows that it prints."""
    # Under TRITON_INTERPRET the decorator yields interpreted functions, hence the process.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    # After what is there already, which may name the versions to test with.
    path = [*filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).parents[2])]
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), *arguments],
        env=environment | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        (90, ["--few"]),
        pytest.param(80, ["--few"], marks=pytest.mark.slow),
        *(pytest.param(arch, ["--all"], marks=pytest.mark.slow) for arch in SHARED),
        # What the choice for these GPUs is not, but a table may ask for.
        pytest.param(90, ["--all", "--pointers"], marks=pytest.mark.slow),
        *(
            pytest.param(arch, ["--all", "--descriptors"], marks=pytest.mark.slow)
            for arch in (90, 100, 120)
        ),
    ],
    ids=lambda value: "".join(value) if isinstance(value, list) else str(value),
)
def test_kernels_compile(arch, options, tmp_path, capsys):
    rows = run_script(tmp_path, str(arch), *options)
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
        in_loops, elsewhere = 0, 64
        # Faster on an H100 than any tile whose sums leave room for both halves of H beside them.
        wide = row["kernel"] == "gated_backward" and row["tile"][:2] == [128, 256]
        if wide:
            elsewhere = 512
        if arch == 120 and row["descriptors"]:
            # No choice of ours, but a table may ask for it. ptxas of Triton 3.6 keeps 8 bytes of a
            # loop over descriptors in local memory there, however many registers are free.
            in_loops, elsewhere = 2, 128
        assert row["spills_in_loops"] <= in_loops, row
        assert row["spilled"] <= elsewhere, row
        assert row["registers"] <= 255, row
        assert row["shared"] <= SHARED[arch], row
        multiplies = row["kernel"] in MATMULS and not row["adds_only"]
        if multiplies and not row["case"].startswith(("fp32", "fp64")):
            # On Hopper the fast matrix units take 64 rows or more; fewer go to the older ones.
            fast = row["tile"][0] >= 64 and arch in (90, 100)
            unit = {90: "wgmma", 100: "tcgen05"}[arch] if fast else "mma"
            assert unit in row["instructions"], row
            if not row["case"].startswith("odd"):
                assert {"cp_async", "tma"} & set(row["instructions"]), row
            assert ("tma" in row["instructions"]) == bool(row["descriptors"]), row
            # Where the numbers of the case lie as TMA demands.
            able = row["case"].split()[0] not in ("odd", "tf32") and row["kernel"] in DESCRIBED
            if "--descriptors" in options:
                assert row["descriptors"] or not able, row
            else:
                # Gathered rows in these tiles were faster through pointers, too.
                meant = able and fast and "--pointers" not in options and not wide
                assert bool(row["descriptors"]) == meant, row


def test_token_counts_share_one_compilation(tmp_path):
    # All of them have at most 1024 rows an expert, and more than 512.
    rows = run_script(tmp_path, "--tokens", "3000", "3001", "3072", "4093", "4096")
    assert len(rows) == 5
    assert rows[0]["variants"]
    assert all(row["variants"] == rows[0]["variants"] for row in rows), rows
