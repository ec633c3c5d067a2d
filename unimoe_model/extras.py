"""Imports of optional packages, with an error that names the extra to install."""

from collections.abc import Iterator
from contextlib import contextmanager

_PACKAGES = {"PIL": "pillow"}
"""Package names that differ from the names of their modules."""


@contextmanager
def needed_by(what: str, extra: str = "media") -> Iterator[None]:
    """Wraps imports of optional packages; if one is missing, the error names the extra.

    Args:
        what: feature that requires the packages, in the singular; the message begins with it.
        extra: name of the extra in `pyproject.toml`.

    Raises:
        ModuleNotFoundError: If a package is not installed; `name` is the name of its module.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").split(".")[0]
        raise ModuleNotFoundError(
            f"{what} needs the package {_PACKAGES.get(module, module)}:"
            f" pip install 'unimoe[{extra}]'",
            name=error.name,
        ) from error
