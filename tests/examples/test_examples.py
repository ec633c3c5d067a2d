"""Every example, at a size that a test has time for."""

import importlib.util
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_drop_in():
    assert example("drop_in").main(steps=150) > 0.5


def test_transformers_moe(capsys):
    errors = example("transformers_moe").main(None, width=64, tokens=32, rounds=1)
    assert errors["eager"] == 0
    assert 0 < errors["unimoe"] < 1e-5
    assert "unimoe" in capsys.readouterr().out


def test_every_example_is_tested():
    tested = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'example("{path.stem}")' in tested
