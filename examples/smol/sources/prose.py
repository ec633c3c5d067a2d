"""Held-out text for perplexity: a manual and literature."""

import gzip
import re
from pathlib import Path
from pydoc_data.topics import topics

PACKAGE = "dict-devil"
_FEWEST_WORDS = 25


def manual() -> str:
    """Returns every eighth topic of Python's language reference."""
    return "\n\n".join(text.strip() for _, text in sorted(topics.items())[::8])


def literature(package: Path) -> str:
    """Returns the entries of Ambrose Bierce's "The Devil's Dictionary" of at least 25 words.

    Args:
        package: folder of the unpacked Debian package.
    """
    path = package / "usr/share/dictd/devil.dict.dz"
    text = gzip.decompress(path.read_bytes()).decode(errors="replace")
    entries = re.split(r"\n(?=[A-Z]{3,}, )", text)[1:]
    clean = [" ".join(entry.split()) for entry in entries]
    return "\n\n".join(entry for entry in clean if len(entry.split()) >= _FEWEST_WORDS)
