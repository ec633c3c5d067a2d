"""README.md and docs/ are true: snippets run; targets, commands, paths and operators exist."""

import contextlib
import importlib.util
import io
import re
import shlex
from pathlib import Path

import pytest

from unimoe_kernels import __version__, _extension, available_backends
from unimoe_kernels.info import backend_choices
from unimoe_model.cli_options import command_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
        ROOT / "benchmarks/README.md",
        *sorted(ROOT.glob("docs/**/*.md")),
    ]
}
# A block of Python, and the output that follows it.
SNIPPET = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)
SNIPPETS = [
    pytest.param(name, *found, id=f"{name}-{index}")
    for name, text in PAGES.items()
    for index, found in enumerate(SNIPPET.findall(text))
]


def operator_rows():
    """Operator -> the cells for CPU and GPU."""
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", PAGES["docs/operators.md"], re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")][1:3] for name, cells in rows}


def tree_paths():
    """The paths in the tree: names before the caption, a folder's contents indented below it."""
    section = PAGES["docs/architecture.md"].split("## Tree\n")[1]
    folder, paths = "", []
    for line in re.search(r"```text\n(.*?)```", section, re.DOTALL)[1].splitlines():
        entry = re.match(r"( *)(.*?)(?: {2,}|$)", line)
        names = entry[2].split(", ")
        if not entry[1]:
            folder = names[0] if names[0].endswith("/") else ""
        inside = folder if entry[1] else ""
        paths += [inside + re.sub(r"<\w+>", "*", name) for name in names]
    return paths


def test_there_is_something_to_check():
    assert len(SNIPPETS) >= 18
    assert len(tree_paths()) >= 20


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 250


@pytest.mark.parametrize(("page", "code", "expected"), SNIPPETS)
def test_snippet_prints_what_the_page_shows(page, code, expected):
    if "pack_weights" in code and not _extension.loaded:
        pytest.skip("needs the C++ extension")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, page, "exec"), {"__name__": "__page__"})
    assert printed.getvalue() == expected


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", PAGES[page], re.MULTILINE))
    assert named <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    if page in ("README.md", "CONTRIBUTING.md"):
        assert named >= {"demo", "test"}


def test_commands_are_understood():
    lines = [
        line
        for text in PAGES.values()
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in re.findall(r"^unimoe .*$", block.replace("\\\n", " "), re.MULTILINE)
    ]
    parsed = [command_parser().parse_args(shlex.split(line, comments=True)[1:]) for line in lines]
    assert {options.command for options in parsed} >= {"train", "generate"}


@pytest.mark.parametrize("path", tree_paths())
def test_tree_path_exists(path):
    assert list(ROOT.glob(path)), f"docs/architecture.md names {path}, which does not exist"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for path, anchor in re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)", PAGES[page]):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links {path}, which does not exist"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(anchor_of, titles), f"{page} links {path}#{anchor}"


def anchor_of(title):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


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


def test_changelog_and_citation_have_the_version_of_the_package():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## \[(\d[\d.]*)\] - (\S+)$", changelog, re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    version, date = releases[0]
    assert version == __version__
    assert f"version: {version}\ndate-released: {date}\n" in citation
