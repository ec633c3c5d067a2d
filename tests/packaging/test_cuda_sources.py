"""Every .cu file compiles against the torch that is here, with or without CUDA in it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# Of the first the kernels alone, which takes half as long.
TARGETS = [
    ("80", "-cubin"),
    *(pytest.param(arch, "-c", marks=pytest.mark.slow) for arch in ("80", "90a", "100", "120")),
]

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@pytest.mark.parametrize(("arch", "kind"), TARGETS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_cuda_source_compiles(build_script, source, arch, kind, tmp_path):
    include = Path(torch.__file__).parent / "include"
    result = subprocess.run(
        [
            "nvcc",
            kind,
            str(source),
            "-o",
            str(tmp_path / "object.o"),
            "-std=c++20",
            "-Xptxas=-v",
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
            f"-I{ROOT / 'csrc'}",
            f"-I{include}",
            "-DUSE_CUDA",
            f"-DTORCH_TARGET_VERSION={build_script.TORCH_TARGET_VERSION}",
            *build_script.NVCC_FLAGS,
        ],
        capture_output=True,
        text=True,
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert "warning" not in output, output
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", output)]
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill stores", output)]
    shared = [int(count) for count in re.findall(r"(\d+) bytes smem", output)]
    print(
        f"{source.name} sm_{arch}: {len(registers)} kernels, "
        f"at most {max(registers, default=0)} registers, "
        f"{max(shared, default=0)} bytes of static shared memory, {sum(spills)} bytes spilled"
    )
    assert not sum(spills)
