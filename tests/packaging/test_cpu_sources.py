"""The CPU operators compile with other compilers, and for processors of another family."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["clang++", "aarch64-linux-gnu-g++"])
def test_cpu_sources_compile(build_script, compiler, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    include = Path(torch.__file__).parent / "include"
    for source in SOURCES:
        result = subprocess.run(
            [
                compiler,
                "-c",
                str(source),
                "-o",
                str(tmp_path / f"{source.stem}.o"),
                "-std=c++20",
                "-fPIC",
                f"-I{ROOT / 'csrc'}",
                f"-I{include}",
                f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}",
                f"-DTORCH_TARGET_VERSION={build_script.TORCH_TARGET_VERSION}",
                *build_script.CXX_FLAGS,
            ],
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, f"{source.name}: {result.stderr}"
        assert "warning" not in result.stderr, f"{source.name}: {result.stderr}"
