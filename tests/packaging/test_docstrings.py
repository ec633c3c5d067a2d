"""Examples in docstrings run and give what they show."""

import ast
import doctest
import math
import os
import tempfile
from importlib import import_module
from pathlib import Path

import pytest
import torch

import unimoe_kernels
from unimoe_kernels import distributed

ROOT = Path(__file__).resolve().parents[2]
# They need several processes, or a model on disk.
ELSEWHERE = {
    "unimoe_kernels.distributed.dispatch.all_to_all": "tests/distributed/all_to_all_scenarios.py",
    "unimoe_model.auto": "tests/model/test_docstrings.py",
    "unimoe_model.chat.conversation": "tests/model/test_docstrings.py",
}
NAMES = {"math": math, "os": os, "tempfile": tempfile, "torch": torch}
NAMES |= {name: getattr(unimoe_kernels, name) for name in unimoe_kernels.__all__}
NAMES |= {name: getattr(distributed, name) for name in distributed.__all__}


def sources():
    """Dotted name of each module of both packages -> its text."""
    found = {}
    for package in ("unimoe_kernels", "unimoe_model"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return found


SOURCES = sources()
WITH_EXAMPLES = [name for name, text in SOURCES.items() if ">>>" in text]


def test_examples_are_found():
    assert len(WITH_EXAMPLES) >= 14
    assert ELSEWHERE.keys() <= set(WITH_EXAMPLES)
    for path in ELSEWHERE.values():
        assert "docstring" in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("module", [name for name in WITH_EXAMPLES if name not in ELSEWHERE])
def test_example_gives_what_it_shows(module):
    loaded = import_module(module)
    names = {**NAMES, **vars(loaded)}
    tests = [t for t in doctest.DocTestFinder().find(loaded, globs=names) if t.examples]
    assert tests, f"{module} shows examples outside of its docstrings"
    for test in tests:
        said = []
        assert doctest.DocTestRunner().run(test, out=said.append).failed == 0, "".join(said)


def test_a_wrong_example_fails():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner().run(test, out=lambda text: None).failed == 1


@pytest.mark.parametrize("module", SOURCES)
def test_examples_are_code(module):
    """An example in prose runs nowhere."""
    for node in ast.walk(ast.parse(SOURCES[module])):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            for line in (ast.get_docstring(node) or "").splitlines():
                assert not line.startswith("Example: "), f"{module}: {line}"
