"""Examples in docstrings of unimoe_model run with a tiny model in the place of a trained one."""

import doctest
from importlib import import_module

import numpy as np
import pytest

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
from PIL import Image


@pytest.mark.parametrize(("module", "replies"), [("auto", False), ("chat.conversation", True)])
def test_example_of_the_docstring(module, replies, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "runs/mine").mkdir(parents=True)
    checkpoint("runs/mine/model")
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / "circle.png")
    monkeypatch.chdir(tmp_path)
    loaded = import_module(f"unimoe_model.{module}")
    tests = [t for t in doctest.DocTestFinder().find(loaded) if t.examples]
    assert tests
    for test in tests:
        if replies:  # what random weights say is no part of the example
            test.examples[-1].want = doctest.ELLIPSIS_MARKER + "\n"
        said = []
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        assert runner.run(test, out=said.append).failed == 0, "".join(said)
