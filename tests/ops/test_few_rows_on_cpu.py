"""`test_few_rows.py` passes on the emulated kernels, and their schedule leaves nothing out."""

import subprocess

import emulated
import pytest

pytestmark = pytest.mark.skipif(emulated.COMPILER == [None], reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulated.build(tmp_path_factory.mktemp("few_rows"), ["grouped_mm_few_rows.cpp"])


@pytest.mark.parametrize(
    ("marks", "least"), [("not slow", 40), pytest.param("slow", 30, marks=pytest.mark.slow)]
)
def test_emulated_kernels_pass(library, marks, least):
    passed = emulated.run_tests(library, "-m", f"not gpu and {marks}", "tests/ops/test_few_rows.py")
    assert passed >= least
    print(f"{passed} tests")


def test_schedule_covers_every_tile_once(tmp_path):
    emulated.copy_sources(tmp_path)
    source = emulated.EMULATION / "few_rows_schedule_test.cpp"
    program = emulated.compile_sources(tmp_path, [source], tmp_path / "schedule")
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "400 cases" in result.stdout
