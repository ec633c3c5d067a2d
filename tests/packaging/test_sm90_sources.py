"""What ptxas makes of the kernels for compute capability 9.0, read without a GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
SOURCES = sorted(CUDA.glob("*_sm90.cu"))
# 65536 registers over 384 threads, in steps of 8.
MOST_REGISTERS = 168
# ptxas says by these that products wait for one another.
SERIALISED = r"C751[0-5]"

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def compile_kernels(build_script, source, output, *flags):
    """Compiles the kernels of a file, and returns what the compilers printed."""
    command = ["nvcc", str(source), "-o", str(output), "-std=c++20", *flags]
    command += [f"-I{ROOT / 'csrc'}", f"-I{Path(torch.__file__).parent / 'include'}", "-DUSE_CUDA"]
    command += [f"-DTORCH_TARGET_VERSION={build_script.TORCH_TARGET_VERSION}"]
    command += build_script.NVCC_FLAGS
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_products_stay_in_registers_and_overlap(build_script, source, tmp_path):
    target = ("-cubin", "-Xptxas=-v", "-gencode=arch=compute_90a,code=sm_90a")
    output = compile_kernels(build_script, source, tmp_path / "kernels.cubin", *target)
    assert not re.search(SERIALISED, output), output
    assert "warning" not in output, output
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", output)]
    assert len(registers) >= 6
    assert max(registers) <= MOST_REGISTERS
    assert set(re.findall(r"(\d+) bytes spill", output)) == {"0"}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_multiply_by_wgmma_and_load_by_tma(build_script, source, tmp_path):
    target = ("-ptx", "-gencode=arch=compute_90a,code=compute_90a")
    compile_kernels(build_script, source, tmp_path / "kernels.ptx", *target)
    kernels = (tmp_path / "kernels.ptx").read_text().split(".entry ")[1:]
    matmuls = [text for text in kernels if "score_gradient" not in text.partition("(")[0]]
    assert len(matmuls) == 6
    for text in matmuls:
        name = text.partition("(")[0]
        # Four steps of 16 in a stage; the compiler may write the loop twice.
        products = re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)\.f32\.(\w+)", text)
        assert len(products) >= 4, name
        assert set(products) == {("m64n256k16", "bf16" if "BFloat16" in name else "f16")}, name
        assert "cp.async.bulk.tensor" in text, name
        assert "atom" not in re.sub(r"\.file.*", "", text), name


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_other_architectures_have_empty_kernels(build_script, source, tmp_path):
    target = ("-ptx", "-gencode=arch=compute_90,code=compute_90")
    compile_kernels(build_script, source, tmp_path / "kernels.ptx", *target)
    text = (tmp_path / "kernels.ptx").read_text()
    assert "wgmma" not in text
    assert "setmaxnreg" not in text
