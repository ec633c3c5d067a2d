"""The documentation site: every page is in the navigation, every public name in the reference.

`make docs` builds it; here its sources are compared with the code, without MkDocs.
"""

import ast
import functools
import inspect
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import unimoe_kernels
import unimoe_model
from unimoe_kernels import distributed, testing

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
REFERENCE = [
    name
    for path in sorted(DOCS.glob("api/*.md"))
    for name in re.findall(r"^::: (\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
]
# An error of the page of troubleshooting; … stands for a value.
ERRORS = re.findall(
    r"^\| `([^`]+)`",
    (DOCS / "troubleshooting.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


class Loader(yaml.SafeLoader):
    """Passes over the tags of mkdocs.yml, which name Python objects."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


@pytest.fixture(scope="module")
def settings():
    return yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)


def nav_pages(entries):
    for entry in entries:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else nav_pages(value)


def test_navigation_has_every_page(settings):
    listed = list(nav_pages(settings["nav"]))
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert len(set(listed)) == len(listed)
    assert pages <= set(listed)
    outside = set(listed) - pages
    assert outside == {"CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md"}
    assert all((ROOT / name).is_file() for name in outside)


def test_site_needs_no_server(settings):
    assert settings["theme"]["font"] is False
    assert settings["use_directory_urls"] is False
    assert not settings["plugins"][-1]["mkdocstrings"]["enable_inventory"]
    for name in (*settings["extra_css"], *settings["extra"]["polyfills"]):
        assert (DOCS / name).is_file()
        assert "http" not in (DOCS / name).read_text(encoding="utf-8")


def found(name):
    """What a dotted name is."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            value = import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, parts[count:], value)
    raise AttributeError(name)


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_names_what_exists(name):
    assert found(name).__doc__
    assert inspect.isfunction(found(name)) or inspect.isclass(found(name))


@pytest.mark.parametrize("package", [unimoe_kernels, distributed, unimoe_model])
def test_reference_has_every_public_name(package):
    documented = [found(name) for name in REFERENCE]
    public = [name for name in package.__all__ if name != "__version__"]
    assert not [name for name in public if getattr(package, name) not in documented]


def test_reference_has_the_helpers_for_tests():
    own = [v for v in vars(testing).values() if getattr(v, "__module__", None) == testing.__name__]
    assert own
    assert not [v for v in own if f"{testing.__name__}.{v.__name__}" not in REFERENCE]


def test_site_builds_without_a_warning(tmp_path):
    """As `make docs` builds it, where the packages of the extra [docs] are installed."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    build = [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "-d", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("index.html", "benchmarks/index.html", "source/examples/own_data.html"):
        assert (tmp_path / name).is_file()
    page = (tmp_path / "api/operators.html").read_text(encoding="utf-8")
    assert "<td><code>topk_softmax</code></td>" in page
    assert "&gt;&gt;&gt;" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


@pytest.fixture(scope="module")
def texts():
    """What strings of the code say, a NUL in the place of each value."""
    found = []
    for path in [ROOT / "setup.py", *ROOT.glob("unimoe_*/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    for path in ROOT.glob("csrc/**/*.*"):
        for call in re.findall(r"UNIMOE_CHECK\((.*?)\);", path.read_text(encoding="utf-8"), re.S):
            found.append("\0".join(re.findall(r'"([^"]*)"', call)))
    return found


def test_troubleshooting_has_errors():
    assert len(ERRORS) > 90
    assert len(set(ERRORS)) == len(ERRORS)


@pytest.mark.parametrize("error", ERRORS)
def test_error_is_one_of_the_code(error, texts):
    pattern = re.compile(".*?".join(map(re.escape, error.split("…"))), re.DOTALL)
    assert any(pattern.search(text) for text in texts), f"nothing in the code says {error!r}"
