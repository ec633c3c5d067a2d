"""The CUDA kernels pass the tests of their operators where they can be emulated, without a GPU."""

from pathlib import Path

import cases
import emulated
import pytest

SOURCES = "".join(map(Path.read_text, sorted(emulated.CUDA.glob("*.cu"))))
OPS = [op for op in cases.operators() if f'm.impl("{op}"' in SOURCES]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulated.COMPILER == [None], reason="needs a C++ compiler"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulated.build(tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.mark.parametrize("op", OPS)
def test_operator_tests_pass(library, op):
    passed = emulated.run_tests(
        library,
        *("-m", "not gpu", f"tests/ops/test_{op}.py", "-k", "cpp or any_shape or default"),
    )
    # The emulated kernels are there, and were what ran.
    assert passed >= 5
    print(f"{op}: {passed} tests")
