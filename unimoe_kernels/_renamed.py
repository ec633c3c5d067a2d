"""Warnings of public names that work for one more version."""

from __future__ import annotations

import warnings


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warns the caller of the function that calls this, naming what takes the place of a name."""
    warnings.warn(
        f"{old} is deprecated and will be removed in the next version: use {new}",
        DeprecationWarning,
        stacklevel=stacklevel,
    )
