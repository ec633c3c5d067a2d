"""Reads a study and checks all that can be known from its file and the recipe."""

from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

from unimoe_model.study.arm_recipe import arm_recipe, raw_recipe
from unimoe_model.study.measures import check_measure
from unimoe_model.study.plan import Arm, Claim, Measure, Study, Table
from unimoe_model.value_types import fits_type

_PATHS = ("recipe", "metrics", "page")


def load_study(path: str | Path) -> Study:
    """Reads a study; `docs/studies.md` explains the keys.

    Args:
        path: a YAML file. Files that it names are relative to its folder.

    Raises:
        ValueError: If the file is missing or no YAML, a key is unknown, missing or wrong, or an arm
            is no valid recipe; naming file, key, value and what was expected.
    """
    path = Path(path)
    raw = raw_recipe(path, "study")
    try:
        study = _study(raw, path)
        for arm in study.arms.values():
            arm_recipe(study, arm, seed=0)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    return study


def _study(raw: dict[str, Any], path: Path) -> Study:
    values = dict(raw)
    for key in _PATHS:
        if values.get(key) is not None:
            if not isinstance(values[key], str):
                raise ValueError(f"{key} ({values[key]!r}) must be a path")
            values[key] = path.parent / values[key]
    if not raw.get("arms"):
        raise ValueError("arms is missing; a study must have arms")
    values["arms"] = {
        name: _arm(name, value) for name, value in _mapping(raw["arms"], "arms").items()
    }
    arms = values["arms"]
    values["claims"] = tuple(_listed(raw, "claims", lambda own, at: _claim(own, at, arms)))
    values["tables"] = tuple(_listed(raw, "tables", lambda own, at: _table(own, at, arms)))
    for key in ("curves", "maps"):
        values[key] = tuple(_named(raw.get(key) or [], key, arms))
    if len({claim.name for claim in values["claims"]}) < len(values["claims"]):
        raise ValueError("claims must have different names")
    return _build(Study, values | {"path": str(path)}, "")


def _arm(name: Any, raw: Any) -> Arm:
    where = f"arms.{name}"
    if not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"arms ({name!r}) must be named by letters, digits, '-' and '_'")
    values = {**_mapping(raw, where), "name": name}
    changes = _mapping(values.get("changes") or {}, f"{where}.changes")
    for stage, own in changes.items():
        _mapping(own, f"{where}.changes.{stage}")
    return _build(Arm, values | {"changes": changes}, where)


def _claim(raw: Any, where: str, arms: Collection[str]) -> Claim:
    values = dict(_mapping(raw, where))
    measure = dict(_mapping(values.get("measure"), f"{where}.measure"))
    kind = measure.pop("kind", None)
    check_measure(kind, measure, arms, f"{where}.measure")
    values["measure"] = Measure(kind, measure)
    _named(values.get("arms"), f"{where}.arms", arms)
    return _build(Claim, values, where)


def _table(raw: Any, where: str, arms: Collection[str]) -> Table:
    values = _mapping(raw, where)
    _named(values.get("arms"), f"{where}.arms", arms)
    return _build(Table, values, where)


def _listed(raw: Mapping[str, Any], key: str, build) -> list:
    found = raw.get(key) or []
    if not isinstance(found, list):
        raise ValueError(f"{key} ({found!r}) must be a list")
    return [build(own, f"{key}[{number}]") for number, own in enumerate(found)]


def _named(raw: Any, where: str, arms: Collection[str]) -> list[str]:
    if not fits_type(raw, list[str]):
        raise ValueError(f"{where} ({raw!r}) must be a list of arms")
    unknown = [name for name in raw if name not in arms]
    if unknown:
        raise ValueError(f"{where} ({unknown[0]!r}) must be among the arms: {', '.join(arms)}")
    return raw


def _build(cls: type, raw: Mapping[str, Any], where: str):
    prefix = f"{where}." if where else ""
    known = {f.name: f for f in fields(cls)}
    unknown = [str(key) for key in raw if key not in known]
    if unknown:
        names = ", ".join(name for name in known if name != "path")
        raise ValueError(f"{prefix}{unknown[0]} is an unknown key; the keys are {names}")
    for name, own in known.items():
        if own.default is MISSING and own.default_factory is MISSING and name not in raw:
            raise ValueError(f"{prefix}{name} is missing")
    for name, wanted in get_type_hints(cls).items():
        if wanted in (str, int, float, bool, list[str] | None, int | None, list[str]):
            value = raw.get(name)
            if name in raw and not fits_type(value, wanted):
                expected = getattr(wanted, "__name__", str(wanted))
                raise ValueError(f"{prefix}{name} ({value!r}) must be of type {expected}")
    try:
        return cls(**raw)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def _mapping(raw: Any, where: str) -> dict:
    if not isinstance(raw, dict):
        raise ValueError(f"{where} ({raw!r}) must be a mapping")
    return raw
