"""README.md says what is so: snippets run, and targets, commands, paths and operators exist."""

import contextlib
import importlib.util
import io
import re
import shlex
from pathlib import Path

import pytest

from unimoe_kernels import _extension, available_backends
from unimoe_kernels.info import backend_choices
from unimoe_model import cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# A block of Python, and the output that follows it.
SNIPPETS = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", README, re.DOTALL)


def section(title):
    """The text under a heading of the second level."""
    found = re.search(rf"(?ms)^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README)
    assert found, f"README.md has no section {title!r}"
    return found[1]


def operator_rows():
    """Operator -> the cells for CPU and GPU."""
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", section("Operators"), re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")][1:3] for name, cells in rows}


def tree_paths():
    """The paths in the tree: names before the caption, a folder's contents indented below it."""
    folder, paths = "", []
    for line in re.search(r"```text\n(.*?)```", section("Tree"), re.DOTALL)[1].splitlines():
        entry = re.match(r"( *)(.*?)(?: {2,}|$)", line)
        names = entry[2].split(", ")
        if not entry[1]:
            folder = names[0] if names[0].endswith("/") else ""
        inside = folder if entry[1] else ""
        paths += [inside + re.sub(r"<\w+>", "*", name) for name in names]
    return paths


def test_there_is_something_to_check():
    assert len(SNIPPETS) >= 5
    assert len(tree_paths()) >= 20


@pytest.mark.parametrize(("code", "expected"), SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet_prints_what_the_readme_shows(code, expected):
    if "pack_weights" in code and not _extension.loaded:
        pytest.skip("needs the C++ extension")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {"__name__": "__readme__"})
    assert printed.getvalue() == expected


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_make_targets_exist(text):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
    assert named >= {"demo", "test", "gpu"}
    assert named <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


def test_commands_are_understood():
    lines = re.findall(r"^unimoe .*$", README, re.MULTILINE)
    parsed = [cli._parser().parse_args(shlex.split(line)[1:]) for line in lines]
    assert {options.command for options in parsed} == {"train", "generate", "chat"}


@pytest.mark.parametrize("path", tree_paths())
def test_tree_path_exists(path):
    assert list(ROOT.glob(path)), f"README.md names {path}, which does not exist"


def test_linked_files_exist():
    for text in (README, CONTRIBUTING):
        for path in re.findall(r"\]\((?!https?://)([^)#]+)", text):
            assert (ROOT / path).is_file(), path


def test_operator_table_has_every_operator():
    assert sorted(operator_rows()) == sorted({row.op for row in backend_choices()})


@pytest.mark.parametrize("op", operator_rows())
def test_operator_table_names_its_backends(op):
    on_cpu, on_gpu = operator_rows()[op]
    if _extension.loaded:
        assert ("C++" in on_cpu) == ("cpp" in available_backends(op, "cpu"))
    if _extension.has_cuda():
        assert ("CUDA" in on_gpu) == ("cuda" in available_backends(op, "cuda"))
    if importlib.util.find_spec("triton"):
        assert ("Triton" in on_gpu) == ("triton" in available_backends(op, "cuda"))
