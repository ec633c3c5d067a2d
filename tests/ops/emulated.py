"""CUDA kernels compiled for the CPU, and tests run on them in a process of their own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CUDA = ROOT / "csrc" / "cuda"
EMULATION = HERE / "cuda_on_cpu"
COMPILER = os.environ.get("CXX", "").split() or [shutil.which("g++") or shutil.which("clang++")]


def copy_sources(folder):
    """Writes the CUDA sources to a folder as C++, with the headers that emulate a device."""
    for header in EMULATION.glob("*.cuh"):
        shutil.copy(header, folder)
    for source in CUDA.iterdir():
        if (EMULATION / source.name).exists():
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
        name = source.with_suffix(".cpp").name if source.suffix == ".cu" else source.name
        (folder / name).write_text(text, encoding="utf-8")


def compile_sources(folder, sources, output, *flags):
    """Compiles C++ files beside those that `copy_sources` wrote."""
    torch_root = Path(torch.__file__).parent
    command = [
        *COMPILER,
        *("-O1", "-std=c++20", "-o", str(output), *flags),
        *map(str, sources),
        *(f"-I{path}" for path in (folder, ROOT / "csrc", torch_root / "include")),
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        *("-ffp-contract=off", f"-L{torch_root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"),
        f"-Wl,-rpath,{torch_root / 'lib'}",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return output


def build(folder, names=None):
    """Compiles all CUDA sources, or those of some names, to a library of operators on the CPU."""
    copy_sources(folder)
    sources = sorted(folder.glob("*.cpp")) if names is None else [folder / n for n in names]
    return compile_sources(folder, sources, folder / "cuda_on_cpu.so", "-shared", "-fPIC")


def run_tests(library, *arguments, **variables):
    """Runs pytest with the emulated kernels in place, and returns how many tests passed."""
    path = [*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT), str(EMULATION)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"UNIMOE_CUDA_ON_CPU": str(library), "PYTHONPATH": os.pathsep.join(path)}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "cuda_on_cpu", *arguments],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    return int(re.search(r"(\d+) passed", result.stdout)[1])
