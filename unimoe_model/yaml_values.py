"""Reads YAML files and builds dataclasses from their values, with errors that name the key."""

from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from unimoe_model.value_types import fits_type

_SHOWN_CHARACTERS = 60


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """Reads the mapping in a YAML file.

    Args:
        path: the file.
        what: what the file is, for errors.

    Raises:
        ValueError: If the file is missing, or is not a mapping in YAML.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{what} ({path}) must be a readable YAML file: {reason}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{what} ({path}) must be a mapping, got {type(raw).__name__}")
    return raw


def build(cls: type, raw: Any, where: str):
    """Builds a dataclass from the values of a key, after checking their names and types.

    Values that were built before, which are dataclasses, tuples or paths, are not checked again.

    Args:
        cls: the dataclass.
        raw: mapping of field names to values.
        where: the key, for errors; empty for the whole file.

    Raises:
        ValueError: If a value is missing, unknown, of another type, or refused by the dataclass.
    """
    raw = require_mapping(raw, where)
    refuse_unknown(raw, [f.name for f in fields(cls)], where)
    prefix = f"{where}." if where else ""
    for f in fields(cls):
        if f.default is MISSING and f.default_factory is MISSING and f.name not in raw:
            raise ValueError(f"{prefix}{f.name} is missing")
    for name, wanted in get_type_hints(cls).items():
        if name in raw and not _is_built(raw[name]) and not fits_type(raw[name], wanted):
            expected = getattr(wanted, "__name__", str(wanted))
            raise ValueError(f"{prefix}{name} ({shortened(raw[name])}) must be of type {expected}")
    try:
        return cls(**raw)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def refuse_unknown(raw: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raises ValueError for the first key of `raw` that is not known."""
    unknown = [str(key) for key in raw if key not in known]
    if unknown:
        place = f"{where} has an unknown key" if where else "unknown key"
        raise ValueError(f"{place} {unknown[0]!r}; there are {', '.join(known)}")


def require_mapping(raw: Any, where: str) -> dict:
    """Returns `raw` if it is a mapping, and raises ValueError otherwise."""
    if not isinstance(raw, dict):
        raise ValueError(f"{where} ({shortened(raw)}) must be a mapping")
    return raw


def shortened(value: Any) -> str:
    """The representation of a value, cut off for errors."""
    text = repr(value)
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"{text[: _SHOWN_CHARACTERS - 3]}..."


def _is_built(value: Any) -> bool:
    """Whether a value was built rather than read from a file."""
    if isinstance(value, dict):
        return any(is_dataclass(item) for item in value.values())
    return is_dataclass(value) or isinstance(value, (tuple, Path))
