"""The CUDA kernels pass the tests of their operators where they can be emulated, without a GPU."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EMULATION = HERE / "cuda_on_cpu"
COMPILER = os.environ.get("CXX", "").split() or [shutil.which("g++") or shutil.which("clang++")]

CUDA = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
OPS = [op for op in cases.operators() if f'm.impl("{op}"' in "".join(map(Path.read_text, CUDA))]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER == [None], reason="needs a C++ compiler"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The CUDA sources, compiled for the CPU with the launcher that emulates a device."""
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    shutil.copy(EMULATION / "launch.cuh", folder)
    objects = []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.*")):
        if source.name == "launch.cuh":
            continue
        text = source.read_text(encoding="utf-8")
        text = re.sub(
            r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+) (\w+)\[\];",
            r"\1* \2 = static_cast<\1*>(emulation::device.shared());",
            text,
        )
        # Blocks run one after the other.
        text = text.replace("__shared__ ", "static ")
        text = text.replace("(unimoe, CUDA, m)", "(unimoe, CPU, m)")
        copy = folder / source.name.replace(".cu", ".cpp" if source.suffix == ".cu" else ".cu")
        copy.write_text(text, encoding="utf-8")
        objects += [copy] if source.suffix == ".cu" else []
    library = folder / "cuda_on_cpu.so"
    torch_root = Path(torch.__file__).parent
    result = subprocess.run(
        [
            *COMPILER,
            *("-shared", "-fPIC", "-O1", "-std=c++20", "-o", str(library)),
            *map(str, objects),
            *(f"-I{path}" for path in (folder, ROOT / "csrc", torch_root / "include")),
            "-DTORCH_TARGET_VERSION=0x020b000000000000",
            *("-ffp-contract=off", f"-L{torch_root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"),
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return library


@pytest.mark.parametrize("op", OPS)
def test_operator_tests_pass(library, op):
    path = [*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT), str(EMULATION)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"UNIMOE_CUDA_ON_CPU": str(library), "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "cuda_on_cpu", "-m", "not gpu"]
    result = subprocess.run(
        [*command, f"tests/ops/test_{op}.py", "-k", "cpp or any_shape or default"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    # The emulated kernels are there, and were what ran.
    passed = int(re.search(r"(\d+) passed", result.stdout)[1])
    assert passed >= 5, result.stdout
    print(f"{op}: {passed} tests")
