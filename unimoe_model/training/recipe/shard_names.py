"""Expansion of shard names, which may have ranges in braces and glob patterns."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def shard_patterns(names: Sequence[str], folder: Path) -> tuple[str, ...]:
    """Expands ranges such as `{000..011}` and returns `glob` patterns with their folder.

    Args:
        names: names from a recipe.
        folder: folder that the names are relative to.

    Raises:
        ValueError: If a range is descending, or there are no names.
    """
    if not names:
        raise ValueError("shards ([]) must name at least one tar")
    expanded = [name for given in names for name in _expanded(given)]
    return tuple(os.path.join(glob.escape(str(folder)), name) for name in expanded)


def shard_files(pattern: str) -> list[Path]:
    """Files that match a pattern, sorted by name."""
    return sorted(Path(name) for name in glob.glob(pattern) if os.path.isfile(name))


def shard_paths(patterns: Sequence[str]) -> list[Path]:
    """Files that match patterns, in the order of the patterns.

    Raises:
        ValueError: If two patterns match the same file.
    """
    paths: list[Path] = []
    for pattern in patterns:
        found = shard_files(pattern)
        twice = set(found) & set(paths)
        if twice:
            raise ValueError(f"shards ({twice.pop()}) must be named once")
        paths += found
    return paths


def _expanded(name: str) -> list[str]:
    match = _RANGE.search(name)
    if match is None:
        return [name]
    first, last = match.groups()
    if int(last) < int(first):
        raise ValueError(f"shards ({name}) must have ranges that go up")
    numbers = range(int(first), int(last) + 1)
    return [
        found
        for number in numbers
        for found in _expanded(
            f"{name[: match.start()]}{number:0{len(first)}d}{name[match.end() :]}"
        )
    ]
