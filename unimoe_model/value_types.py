"""Checks of types and bounds of user-provided values."""

from types import UnionType
from typing import Any, get_args, get_origin


def fits_type(value: Any, wanted: Any) -> bool:
    """Whether a YAML or JSON value has an annotated type.

    An int is accepted as a float; a bool is not a number.
    """
    if isinstance(wanted, UnionType):
        return any(fits_type(value, choice) for choice in get_args(wanted))
    if get_origin(wanted) is dict:
        values = get_args(wanted)[1]
        return isinstance(value, dict) and all(fits_type(v, values) for v in value.values())
    if get_origin(wanted) is list:
        return isinstance(value, list) and all(fits_type(v, get_args(wanted)[0]) for v in value)
    if wanted is Any:
        return True
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, (int, float) if wanted is float else wanted)


def require_at_least(least: float, **values: float | None) -> None:
    """Raises ValueError for the first value that is less than `least`; None is ignored."""
    for name, value in values.items():
        if value is not None and not value >= least:
            raise ValueError(f"{name} ({value}) must be at least {least}")


def require_positive(**values: float | None) -> None:
    """Raises ValueError for the first value that is not above 0; None is ignored."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} ({value}) must be above 0")
