"""Which things, recordings and prompts are held out: names alone, in `split.json`.

Example:
    python -m examples.smol.split --debian runs/smol/debian

rewrites the file from the installed sources; training and evaluation only read it.
"""

import argparse
import json
import sys
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from examples.demo.exit_code import exit_code_of
from examples.smol.catalogue import load_catalogue, split_groups

SPLIT_FILE = Path(__file__).with_name("split.json")
_ONE_IN = 5


def is_drawn(source: str, group: str) -> bool:
    """Returns whether a new split holds out a group: one in five, by a hash of its name."""
    return zlib.crc32(f"{source}/{group}".encode()) % _ONE_IN == 0


def draw_split(groups: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """Draws the held-out groups of each source, sorted."""
    return {
        source: sorted({group for group in own if is_drawn(source, group)})
        for source, own in groups.items()
    }


def read_split(path: Path = SPLIT_FILE) -> dict[str, frozenset[str]]:
    """Reads the held-out groups of each source.

    Raises:
        ValueError: If the file is not a JSON object of lists of names.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return {source: frozenset(groups) for source, groups in raw.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"split ({path}) must be a JSON object of lists: {error}") from error


def main() -> int:
    """Writes the split of the installed sources."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--debian", type=Path, required=True, help="unpacked packages of Debian")
    options = parser.parse_args()

    def write() -> None:
        groups = split_groups(load_catalogue(options.debian))
        text = json.dumps(draw_split(groups), indent=1, ensure_ascii=False)
        SPLIT_FILE.write_text(f"{text}\n", encoding="utf-8")

    return exit_code_of("split", write)


if __name__ == "__main__":
    sys.exit(main())
