"""Reads a study and checks everything that depends on its file and recipe alone."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from unimoe_model.study.arm_recipe import arm_recipe
from unimoe_model.study.measures import check_measure
from unimoe_model.study.plan import Arm, Claim, Measure, Study, Table
from unimoe_model.value_types import fits_type
from unimoe_model.yaml_values import build, read_mapping, refuse_unknown, require_mapping

_PATHS = ("recipe", "metrics", "page")


def load_study(path: str | Path) -> Study:
    """Reads and checks a study; `docs/studies.md` documents its keys.

    Args:
        path: YAML file. Paths in it are relative to its folder.

    Raises:
        ValueError: If the file is missing or not YAML, a key is unknown, missing or invalid, or the
            recipe of an arm is invalid; the message names file, key, value and what was expected.
    """
    path = Path(path)
    raw = read_mapping(path, "study")
    try:
        study = _study(raw, path)
        for arm in study.arms.values():
            arm_recipe(study, arm, seed=0)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    return study


def _study(raw: dict[str, Any], path: Path) -> Study:
    refuse_unknown(raw, [f.name for f in fields(Study) if f.name != "path"], "")
    values = dict(raw)
    for key in _PATHS:
        if values.get(key) is not None:
            if not isinstance(values[key], str):
                raise ValueError(f"{key} ({values[key]!r}) must be a path")
            values[key] = path.parent / values[key]
    if not raw.get("arms"):
        raise ValueError("arms is missing; a study must have arms")
    values["arms"] = {
        name: _arm(name, value) for name, value in require_mapping(raw["arms"], "arms").items()
    }
    arms = values["arms"]
    values["claims"] = tuple(_listed(raw, "claims", lambda own, at: _claim(own, at, arms)))
    values["tables"] = tuple(_listed(raw, "tables", lambda own, at: _table(own, at, arms)))
    for key in ("curves", "maps"):
        values[key] = tuple(_named(raw.get(key) or [], key, arms))
    if len({claim.name for claim in values["claims"]}) < len(values["claims"]):
        raise ValueError("claims must have different names")
    return build(Study, values | {"path": str(path)}, "")


def _arm(name: Any, raw: Any) -> Arm:
    where = f"arms.{name}"
    if not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"arms ({name!r}) must be named by letters, digits, '-' and '_'")
    values = {**require_mapping(raw, where), "name": name}
    changes = require_mapping(values.get("changes") or {}, f"{where}.changes")
    for stage, own in changes.items():
        require_mapping(own, f"{where}.changes.{stage}")
    return build(Arm, values | {"changes": changes}, where)


def _claim(raw: Any, where: str, arms: Collection[str]) -> Claim:
    values = dict(require_mapping(raw, where))
    measure = dict(require_mapping(values.get("measure"), f"{where}.measure"))
    kind = measure.pop("kind", None)
    check_measure(kind, measure, arms, f"{where}.measure")
    values["measure"] = Measure(kind, measure)
    _named(values.get("arms"), f"{where}.arms", arms)
    return build(Claim, values, where)


def _table(raw: Any, where: str, arms: Collection[str]) -> Table:
    values = require_mapping(raw, where)
    _named(values.get("arms"), f"{where}.arms", arms)
    return build(Table, values, where)


def _listed(raw: Mapping[str, Any], key: str, read: Callable[[Any, str], Any]) -> list:
    found = raw.get(key) or []
    if not isinstance(found, list):
        raise ValueError(f"{key} ({found!r}) must be a list")
    return [read(own, f"{key}[{number}]") for number, own in enumerate(found)]


def _named(raw: Any, where: str, arms: Collection[str]) -> list[str]:
    if not fits_type(raw, list[str]):
        raise ValueError(f"{where} ({raw!r}) must be a list of arms")
    unknown = [name for name in raw if name not in arms]
    if unknown:
        raise ValueError(f"{where} ({unknown[0]!r}) must be among the arms: {', '.join(arms)}")
    return raw
