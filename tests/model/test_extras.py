"""Errors of an install without extras where a package is missing."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from unimoe_model.data import audio_io, media_items
from unimoe_model.extras import needed_by

ROOT = Path(__file__).parents[2]
MODULES = {"pillow": "PIL"}


def extra_modules() -> set[str]:
    """Modules of the packages that only `[media]` and `[eval]` install."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {*extras["optional-dependencies"]["media"], *extras["optional-dependencies"]["eval"]}
    return {MODULES.get(package, package) for package in named - {"unimoe[media]"}}


def imported(node) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return {node.module.split(".")[0]}
    return set()


def unguarded(tree: ast.AST, modules: set[str]) -> set[str]:
    """Modules of a tree's imports outside `with needed_by(...)` blocks."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.With) and "needed_by(" in ast.unparse(node.items[0]):
            continue
        found |= imported(node) & modules | unguarded(node, modules)
    return found


def test_every_import_of_an_extra_names_it():
    modules = extra_modules()
    assert modules >= {"PIL", "av", "jiwer", "matplotlib", "scipy", "soundfile"}
    found = {
        str(path.relative_to(ROOT)): names
        for path in (ROOT / "unimoe_model").rglob("*.py")
        if (names := unguarded(ast.parse(path.read_text(encoding="utf-8")), modules))
    }
    assert found == {}


def test_the_error_names_package_and_extra():
    error = r"^tea needs the package pillow: pip install 'unimoe\[eval\]'$"
    with pytest.raises(ModuleNotFoundError, match=error) as caught, needed_by("tea", "eval"):
        raise ModuleNotFoundError("No module named 'PIL.Image'", name="PIL.Image")
    assert caught.value.name == "PIL.Image"


def hide(monkeypatch, package: str) -> None:
    """Simulates that a package is not installed."""
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


def executed(tree: ast.AST) -> Iterator[ast.AST]:
    """Import statements that run when a file is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not isinstance(node, ast.FunctionDef):
            yield from executed(node)


@cache
def imports_of(path: Path) -> tuple[set[str], set[Path]]:
    """Top-level packages, and files of this repository, that a file imports."""
    packages, files = set(), set()
    for node in executed(ast.parse(path.read_text(encoding="utf-8"))):
        packages |= imported(node)
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{name}" for name in names)]
        for name in names:
            place = Path(*name.split("."))
            for base in (ROOT / place, path.parent / place):
                files |= {base / "__init__.py", base.with_suffix(".py")}
    return packages, {file for file in files if file.is_file()}


def packages_of(path: Path, seen: set[Path]) -> set[str]:
    """The same, with indirect imports."""
    if path in seen:
        return set()
    seen.add(path)
    packages, files = imports_of(path)
    return packages.union(*(packages_of(file, seen) for file in files))


def test_files_of_tests_are_skipped_where_an_extra_is_missing():
    """And do not stop the collection of all others."""
    missing, extras = {}, extra_modules()
    for path in (ROOT / "tests").rglob("test_*.py"):
        skipped = re.findall(r'^pytest\.importorskip\("(\w+)"', path.read_text(), re.MULTILINE)
        if stopping := packages_of(path, set()) & extras - set(skipped):
            missing[path.name] = stopping
    assert missing == {}


@pytest.mark.parametrize(
    ("module", "package", "named", "extra"),
    [
        ("data.pictures", "PIL", "pillow", "media"),
        ("data.media_io", "PIL", "pillow", "media"),
        ("evaluation.plots", "matplotlib", "matplotlib", "eval"),
    ],
)
def test_modules_name_the_extra(monkeypatch, module, package, named, extra):
    name = f"unimoe_model.{module}"
    hide(monkeypatch, package)
    for held in (name, "unimoe_model.data.media_io", "unimoe_model.data.pictures"):
        monkeypatch.delitem(sys.modules, held, raising=False)
    with pytest.raises(ModuleNotFoundError, match=rf"package {named}: pip .*'unimoe\[{extra}\]'"):
        import_module(name)


@pytest.mark.parametrize(
    ("module", "use"),
    [
        ("soundfile", lambda: audio_io.load_wav("a.wav", 8000)),
        ("scipy", lambda: audio_io.resample(np.zeros(9, np.float32), 8000, 4000)),
        ("av", lambda: media_items.as_video(b"no picture", 2, "videos")),
    ],
)
def test_functions_name_the_extra(monkeypatch, module, use):
    if module == "av" and find_spec("PIL") is None:
        pytest.skip("pillow is not installed: pip install .[media]")
    hide(monkeypatch, module)
    with pytest.raises(
        ModuleNotFoundError, match=rf"needs the package {module}: .*unimoe\[media\]"
    ):
        use()


COMMANDS = """
import sys
sys.modules.update(dict.fromkeys(["PIL", "av", "jiwer", "matplotlib", "scipy", "soundfile"]))
from unimoe_model.cli import main
from unimoe_model.data.media_items import as_picture
recipe, data, output = sys.argv[1:]
asked = ["--model", output, "--data", data, "--output", output]
assert main(["train", recipe, "--output", output]) == 1
assert main(["eval", *asked, "--metric", "wer"]) == 1
assert main(["routing", *asked]) == 1
try:
    as_picture("a.png", "images")
except ModuleNotFoundError as error:
    print("picture:", error, file=sys.stderr)
"""


@pytest.mark.slow
def test_commands_without_the_extra(tmp_path):
    pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
    pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
    from recipe_case import write_case

    recipe, output = write_case(tmp_path / "case"), tmp_path / "runs"
    command = [sys.executable, "-c", COMMANDS, recipe, recipe.with_name("words.jsonl"), output]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if re.match("unimoe |picture:", line)]
    extras = {"unimoe train": "media", "unimoe eval": "eval", "unimoe routing": "eval"}
    expected = [*extras.items(), ("picture", "media")]
    for line, (place, extra) in zip(lines, expected, strict=True):
        assert line.startswith(f"{place}: ")
        assert line.endswith(f": pip install 'unimoe[{extra}]'")
    assert not output.exists()
