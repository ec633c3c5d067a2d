"""Measured tiles: `tiles.json` beside this file, and the file that `UNIMOE_TILES` names.

    {"note": "...",
     "descriptors": false,
     "entries": [{"capability": 90, "problem": {...}, "tile": {...}}, ...],
     "unchanged": [{"capability": 90, "problem": {...}}, ...],
     "failed": [{"capability": 90, "problem": {...}, "tile": {...}}, ...]}

`entries` have the fields of `Problem` and of `Tile`; `unchanged` are measured problems for which
the analytic tile is the fastest; `failed` tiles did not run or gave wrong results, and are not
tuned again. `descriptors: false` disables tensor descriptors in every kernel. Only `entries` is
required. `python -m unimoe_kernels.tune` writes such files, with its measurements in further
fields. If both files have a problem, the user's entry takes precedence.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch

from unimoe_kernels._triton.problem import KINDS, MAX_ROWS, Problem, Tile

SHIPPED = Path(__file__).with_name("tiles.json")
VARIABLE = "UNIMOE_TILES"
DTYPES = ("bfloat16", "float16", "float32", "float64")
TOP_FIELDS = {"note", "machine", "descriptors", "entries", "unchanged", "failed", "trying"}
RECORD_FIELDS = {
    "capability",
    "problem",
    "tile",
    "analytic",
    "seconds",
    "analytic_seconds",
    "error",
}


class Table(NamedTuple):
    """Measured tiles.

    Attributes:
        tiles: By compute capability (such as 90) and problem, the fastest tile, or None if that is
            the analytic one.
        descriptors: Whether tiles may use tensor descriptors.
    """

    tiles: dict[tuple[int, Problem], Tile | None]
    descriptors: bool = True

    def updated(self, other: Table) -> Table:
        """Returns this table updated with another, which takes precedence."""
        return Table(self.tiles | other.tiles, self.descriptors and other.descriptors)


def load() -> Table:
    """Reads the shipped table and updates it with that of `UNIMOE_TILES`.

    Raises:
        ValueError: If a file cannot be read or is invalid; the error names file and field.
    """
    table = read(SHIPPED, "the shipped tile table")
    own = os.environ.get(VARIABLE)
    return table.updated(read(Path(own), VARIABLE)) if own else table


def read(path: Path, name: str) -> Table:
    """Reads one file; `name` identifies it in errors.

    Raises:
        ValueError: If the file cannot be read or is invalid; the error names the field.
    """
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{name} ({path}) must be a readable JSON file: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name} ({path}): {error}") from error


def parse(content: object) -> Table:
    """Parses the content of a file.

    Raises:
        ValueError: If a field is invalid; the error names field, value and expectation.
    """
    _check_fields("the file", content, TOP_FIELDS, {"entries"})
    descriptors = content.get("descriptors", True)
    _check("descriptors", descriptors, isinstance(descriptors, bool), "true or false")
    tiles: dict[tuple[int, Problem], Tile | None] = {}
    for part in ("entries", "unchanged", "failed"):
        records = content.get(part, [])
        _check(part, records, isinstance(records, list), "a list")
        for index, record in enumerate(records):
            name = f"{part}[{index}]"
            key, tile = _parse_record(name, record, part != "unchanged")
            if part == "failed":
                continue
            if key in tiles:
                raise ValueError(f"{name}.problem is a duplicate of an earlier record")
            tiles[key] = tile
    if "trying" in content:
        _parse_record("trying", content["trying"], True)
    return Table(tiles, descriptors)


def _parse_record(
    name: str, record: object, has_tile: bool
) -> tuple[tuple[int, Problem], Tile | None]:
    wanted = {"capability", "problem"} | ({"tile"} if has_tile else set())
    _check_fields(name, record, RECORD_FIELDS, wanted)
    capability = record["capability"]
    _check(f"{name}.capability", capability, _is_int(capability, 10), "an integer such as 90")
    problem = parse_problem(f"{name}.problem", record["problem"])
    tile = parse_tile(f"{name}.tile", record["tile"]) if has_tile else None
    if "analytic" in record:
        parse_tile(f"{name}.analytic", record["analytic"])
    if tile is not None and tile.descriptors:
        able = capability >= 90 and problem.dtype.itemsize == 2
        expected = "false below capability 90 and for dtypes of more than 16 bits"
        _check(f"{name}.tile.descriptors", True, able, expected)
    return (capability, problem), tile


def parse_problem(name: str, fields: object) -> Problem:
    """Parses a problem; raises ValueError like `parse`."""
    _check_fields(name, fields, set(Problem._fields), set(Problem._fields) - {"tf32"})
    values = {"tf32": False} | fields
    _check(f"{name}.kind", values["kind"], values["kind"] in KINDS, f"one of {', '.join(KINDS)}")
    dtype = values["dtype"]
    _check(f"{name}.dtype", dtype, dtype in DTYPES, f"one of {', '.join(DTYPES)}")
    for field, least in {"inner": 0, "width": 1, "height": 0, "experts": 1, "top_k": 1}.items():
        value = values[field]
        _check(f"{name}.{field}", value, _is_int(value, least), f"an integer >= {least}")
    rows = values["rows"]
    expected = f"a power of 2 up to {MAX_ROWS}"
    _check(f"{name}.rows", rows, _is_power(rows, 1) and rows <= MAX_ROWS, expected)
    _check(f"{name}.tf32", values["tf32"], isinstance(values["tf32"], bool), "true or false")
    return Problem(**{**values, "dtype": getattr(torch, dtype)})


def parse_tile(name: str, fields: object) -> Tile:
    """Parses a tile; raises ValueError like `parse`."""
    _check_fields(name, fields, set(Tile._fields), set(Tile._fields) - {"descriptors"})
    for field in ("block_m", "block_n", "block_k"):
        value = fields[field]
        _check(f"{name}.{field}", value, _is_power(value, 16), "a power of 2, at least 16")
    _check(
        f"{name}.num_warps",
        fields["num_warps"],
        _is_power(fields["num_warps"], 1) and fields["num_warps"] <= 32,
        "a power of 2 up to 32",
    )
    for field in ("group_m", "num_stages"):
        _check(f"{name}.{field}", fields[field], _is_int(fields[field], 1), "an integer >= 1")
    descriptors = fields.get("descriptors", False)
    _check(f"{name}.descriptors", descriptors, isinstance(descriptors, bool), "true or false")
    return Tile(**fields)


def _check(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} ({json.dumps(value)}) must be {expected}")


def _check_fields(name: str, value: object, known: set[str], wanted: set[str]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, not {json.dumps(value)}")
    for field in sorted(set(value) - known):
        raise ValueError(f"{name} has the unknown field {field!r}; known: {sorted(known)}")
    for field in sorted(wanted - set(value)):
        raise ValueError(f"{name} has no field {field!r}, which is required")


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_power(value: object, least: int) -> bool:
    return _is_int(value, least) and value & (value - 1) == 0
