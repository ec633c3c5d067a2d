"""Console blocks of the pages show what their commands print.

Commands with arguments under `runs/`, or `questions.jsonl`, need a trained model and are not run.
"""

import contextlib
import re
import shlex
from pathlib import Path

import pytest

from unimoe_kernels import _extension, info
from unimoe_model import cli

ROOT = Path(__file__).resolve().parents[2]
TRAINED = re.compile(r"\bruns/|\bquestions\.jsonl\b")


def transcripts():
    """Page, command and printed text of each command in a console block."""
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]:
        text = path.read_text(encoding="utf-8")
        for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
            for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
                command, _, printed = part.partition("\n")
                yield str(path.relative_to(ROOT)), command, printed


ALL = list(transcripts())
CHEAP = [t for t in ALL if t[2].strip() and not TRAINED.search(t[1])]


def printed_by(command, capsys):
    program, *arguments = shlex.split(command)
    if [program, *arguments] == ["python", "-m", "unimoe_kernels.info"]:
        return info.describe()
    assert program == "unimoe", f"{command}: no way to run it here"
    with contextlib.suppress(SystemExit):  # of --help and --version
        cli.main(arguments)
    captured = capsys.readouterr()
    return captured.out + captured.err


def labels(text):
    """What of the output of unimoe_kernels.info does not depend on the machine."""
    facts, choices = text.strip().split("\n\n")
    rows = [line.split()[:2] for line in choices.splitlines()]
    return [re.split(r" {2,}", line.strip())[0] for line in facts.splitlines()], rows


def test_there_is_something_to_compare():
    assert len(CHEAP) >= 4
    assert len(ALL) > len(CHEAP)


@pytest.mark.parametrize(("page", "command", "expected"), CHEAP)
def test_command_prints_what_the_page_shows(page, command, expected, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    found = printed_by(command, capsys)
    if "unimoe_kernels.info" in command:
        if not _extension.loaded:
            pytest.skip("the page shows an installation with the extension")
        assert labels(found) == labels(expected)
    else:
        assert found.split() == expected.split()
