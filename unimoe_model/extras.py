"""Packages that only the optional extras install, and the error that names the extra."""

from collections.abc import Iterator
from contextlib import contextmanager

_PACKAGES = {"PIL": "pillow"}
"""Names of packages whose modules are called otherwise."""


@contextmanager
def needed_by(what: str, extra: str = "media") -> Iterator[None]:
    """Around imports of an extra's packages: the error says how to install them.

    Args:
        what: what needs them, in the singular; the message begins with it.
        extra: of `pyproject.toml`.

    Raises:
        ModuleNotFoundError: If a package is missing; `name` is that of its module.
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
