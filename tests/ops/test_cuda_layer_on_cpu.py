"""`test_cuda_layer.py` passes on the emulated kernels."""

import emulated
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulated.COMPILER == [None], reason="needs a C++ compiler"),
]


def test_emulated_layer_passes(tmp_path):
    library = emulated.build(tmp_path)
    assert emulated.run_tests(library, "tests/ops/test_cuda_layer.py") >= 15
