"""Every .cu file compiles against the torch that is here, with or without CUDA in it."""

import functools
import importlib.util
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
# What the kernels of a name must run on an A100: tensor cores, and copies past the registers.
INSTRUCTIONS = {"few_rows_kernel": ("HMMA.16816.F32", "LDGSTS.E.BYPASS.LTC128B.128", "LDSM")}

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@pytest.fixture(scope="module")
def compiled(build_script, tmp_path_factory):
    """A function that compiles a source once, and returns the object and what nvcc printed."""
    include = Path(torch.__file__).parent / "include"
    folder = tmp_path_factory.mktemp("objects")

    @functools.cache
    def compile_source(source, arch, kind):
        output = folder / f"{source.stem}-{arch}{kind}.o"
        result = subprocess.run(
            [
                "nvcc",
                kind,
                str(source),
                "-o",
                str(output),
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
        printed = result.stdout + result.stderr
        assert result.returncode == 0, printed
        return output, printed

    return compile_source


@pytest.mark.parametrize(("arch", "kind"), TARGETS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_cuda_source_compiles(compiled, source, arch, kind):
    _, output = compiled(source, arch, kind)
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


def find_cuobjdump():
    """The toolkit's, or the one that comes with Triton."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None:
        return None
    bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return bundled if bundled.exists() else None


def test_few_rows_run_on_tensor_cores(compiled):
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("needs cuobjdump")
    cubin, _ = compiled(ROOT / "csrc" / "cuda" / "grouped_mm_few_rows.cu", "80", "-cubin")
    result = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernels = re.split(r"Function : ", result.stdout)[1:]
    for name, instructions in INSTRUCTIONS.items():
        ours = [code for code in kernels if name in code.split("\n", 1)[0]]
        assert ours, name
        for code in ours:
            assert all(instruction in code for instruction in instructions), code[:200]
