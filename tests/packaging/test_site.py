"""The documentation site: every page is in the navigation, every public name in the reference.

`make docs` builds it; here its sources are compared with the code, without MkDocs.
"""

import ast
import re
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
    pytest.param(path.name, name, id=name)
    for path in sorted(DOCS.glob("api/*.md"))
    for name in re.findall(r"^::: (\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
]
DOCUMENTED = {param.values[1] for param in REFERENCE}
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


@pytest.mark.parametrize(("page", "name"), REFERENCE)
def test_reference_names_what_exists(page, name):
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            found = import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        assert found.__doc__, f"docs/api/{page}: {name} has no docstring"
        return
    raise AssertionError(f"docs/api/{page}: {name} does not exist")


@pytest.mark.parametrize("package", [unimoe_kernels, distributed, unimoe_model])
def test_reference_has_every_public_name(package):
    public = {f"{package.__name__}.{name}" for name in package.__all__ if name != "__version__"}
    assert not public - DOCUMENTED


def test_reference_has_the_helpers_for_tests():
    public = {
        f"{testing.__name__}.{name}"
        for name, value in vars(testing).items()
        if getattr(value, "__module__", None) == testing.__name__
    }
    assert public
    assert not public - DOCUMENTED


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
