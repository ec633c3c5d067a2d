"""A malformed table of tiles gives one error that names the file and the field."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from unimoe_kernels._triton import table
from unimoe_kernels._triton.problem import Problem, Tile
from unimoe_kernels.info import describe

GOOD = {
    "note": "",
    "descriptors": True,
    "entries": [
        {
            "capability": 90,
            "problem": {
                "kind": "gated",
                "inner": 64,
                "width": 32,
                "height": 0,
                "experts": 4,
                "top_k": 2,
                "dtype": "bfloat16",
                "rows": 8,
            },
            "tile": {
                "block_m": 16,
                "block_n": 32,
                "block_k": 64,
                "group_m": 8,
                "num_warps": 4,
                "num_stages": 2,
                "descriptors": True,
            },
            "seconds": 1e-3,
        }
    ],
}


def changed(path, value):
    """The good table with one field replaced, or removed where the value is `...`."""
    content = copy.deepcopy(GOOD)
    *parents, last = path
    target = content
    for name in parents:
        target = target[name]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return content


def test_good_table():
    problem = Problem("gated", 64, 32, 0, 4, 2, torch.bfloat16, 8)
    tile = Tile(16, 32, 64, 8, 4, 2, True)
    assert table.parse(GOOD) == table.Table({(90, problem): tile}, True)
    without = changed(("entries", 0, "tile", "descriptors"), ...)
    assert table.parse(without).tiles == {(90, problem): tile._replace(descriptors=False)}


FIRST = ("entries", 0)
PROBLEM, TILE = (*FIRST, "problem"), (*FIRST, "tile")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("entries",), ..., "the file has no field 'entries'"),
        (("entries",), {}, r"entries \(\{\}\) must be a list"),
        (("entries",), [3], r"entries\[0\] must be an object, not 3"),
        (("entry",), [], "the file has the unknown field 'entry'"),
        (("descriptors",), 1, r"descriptors \(1\) must be true or false"),
        (("unchanged",), [{"capability": 90}], r"unchanged\[0\] has no field 'problem'"),
        (("failed",), [GOOD["entries"][0] | {"tile": {}}], r"failed\[0\].tile has no field"),
        (("trying",), {}, "trying has no field 'capability'"),
        ((*FIRST, "analytic"), 3, r"entries\[0\].analytic must be an object, not 3"),
        ((*FIRST, "tile"), ..., r"entries\[0\] has no field 'tile'"),
        ((*FIRST, "tiel"), 1, r"entries\[0\] has the unknown field 'tiel'"),
        ((*FIRST, "capability"), "sm_90", r"entries\[0\].capability \(\"sm_90\"\) must be an int"),
        ((*PROBLEM, "kind"), "row", r"entries\[0\].problem.kind \(\"row\"\) must be one of rows,"),
        ((*PROBLEM, "dtype"), "int8", r"problem.dtype \(\"int8\"\) must be one of bfloat16"),
        ((*PROBLEM, "rows"), 12, r"problem.rows \(12\) must be a power of 2 up to 4096"),
        ((*PROBLEM, "rows"), 8192, r"problem.rows \(8192\) must be a power of 2 up to 4096"),
        ((*PROBLEM, "experts"), 0, r"problem.experts \(0\) must be an integer >= 1"),
        ((*PROBLEM, "width"), True, r"problem.width \(true\) must be an integer >= 1"),
        ((*PROBLEM, "inner"), ..., r"problem has no field 'inner'"),
        ((*PROBLEM, "tf32"), "no", r"problem.tf32 \(\"no\"\) must be true or false"),
        (
            (*TILE, "block_m"),
            48,
            r"entries\[0\].tile.block_m \(48\) must be a power of 2, at least",
        ),
        ((*TILE, "block_k"), 8, r"tile.block_k \(8\) must be a power of 2, at least 16"),
        ((*TILE, "num_warps"), 3, r"tile.num_warps \(3\) must be a power of 2 up to 32"),
        ((*TILE, "num_stages"), 0, r"tile.num_stages \(0\) must be an integer >= 1"),
        ((*TILE, "group_m"), 1.5, r"tile.group_m \(1.5\) must be an integer >= 1"),
        ((*TILE, "descriptors"), "yes", r"tile.descriptors \(\"yes\"\) must be true or false"),
        (
            (*FIRST, "capability"),
            80,
            r"tile.descriptors \(true\) must be false below capability 90",
        ),
        ((*PROBLEM, "dtype"), "float32", r"tile.descriptors \(true\) must be false below"),
    ],
)
def test_malformed_field(path, value, message, tmp_path, monkeypatch):
    content = changed(path, value)
    with pytest.raises(ValueError, match=message):
        table.parse(content)
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.setenv(table.VARIABLE, str(file))
    with pytest.raises(ValueError, match=rf"UNIMOE_TILES \({file}\): .*{message}"):
        table.load()


def test_problem_that_is_there_twice():
    content = changed(("note",), "")
    content["entries"] *= 2
    with pytest.raises(
        ValueError, match=r"entries\[1\].problem is a duplicate of an earlier record"
    ):
        table.parse(content)


@pytest.mark.parametrize("text", [None, "{", "\ufffd\x00"])
def test_file_that_cannot_be_read(text, tmp_path, monkeypatch):
    path = Path(tmp_path / "mine.json")
    if text is not None:
        path.write_text(text, encoding="utf-8")
    monkeypatch.setenv(table.VARIABLE, str(path))
    with pytest.raises(ValueError, match=rf"UNIMOE_TILES \({path}\) must be a readable JSON file"):
        table.load()


def test_info_says_which_tables_are_read(tmp_path, monkeypatch):
    monkeypatch.delenv(table.VARIABLE, raising=False)
    assert re.search(r"Triton tiles +\d+ problems measured in the shipped table\n", describe())
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(GOOD | {"descriptors": False}), encoding="utf-8")
    monkeypatch.setenv(table.VARIABLE, str(path))
    assert f"and UNIMOE_TILES ({path}); descriptors are off" in describe()
    path.write_text("{}", encoding="utf-8")
    assert f"UNIMOE_TILES ({path}): the file has no field 'entries'" in describe()
