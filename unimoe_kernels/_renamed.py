"""Deprecation warnings for renamed public names, which are kept for one more version."""

from __future__ import annotations

import warnings


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warns that `old` is deprecated and names its replacement.

    The default `stacklevel` points to the caller of the function that calls this one.
    """
    warnings.warn(
        f"{old} is deprecated and will be removed in the next version: use {new}",
        DeprecationWarning,
        stacklevel=stacklevel,
    )
