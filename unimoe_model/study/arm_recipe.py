"""Recipes of arms: the recipe of the study with the changes of an arm."""

from copy import deepcopy
from typing import Any

from unimoe_model.study.plan import Arm, Study
from unimoe_model.training.checkpoint import fingerprint
from unimoe_model.training.recipe import Recipe, load_recipe
from unimoe_model.yaml_values import read_mapping


def arm_recipe(study: Study, arm: Arm, seed: int) -> Recipe:
    """Builds the recipe of an arm.

    The recipe has all stages of the study's recipe; `needed_stages` lists those to train.

    Raises:
        ValueError: If a change or evaluation names nothing in the recipe, or the result is no valid
            recipe.
    """
    own = _own_keys(study, arm)
    try:
        return load_recipe(study.recipe, seed=seed, **own)
    except ValueError as error:
        raise ValueError(f"arms.{arm.name}: {error}") from error


def arm_settings(study: Study, arm: Arm, seed: int) -> str:
    """Hash of the settings of a run in the files of the study, without its data and models.

    Raises:
        ValueError: As `arm_recipe`.
    """
    own, recipe = _own_keys(study, arm), arm_recipe(study, arm, seed)
    needed = needed_stages(recipe, arm.stage)
    stages = [stage for stage in own["stages"] if stage["name"] in needed]
    connectors = read_mapping(study.recipe, "recipe").get("connectors")
    return fingerprint([stages, own["evaluate"], connectors, seed, study.routed])


def _own_keys(study: Study, arm: Arm) -> dict[str, Any]:
    """Top-level keys of the recipe that depend on the arm."""
    raw = read_mapping(study.recipe, "recipe")
    stages = deepcopy(raw.get("stages") or [])
    by_name = {stage.get("name"): stage for stage in stages if isinstance(stage, dict)}
    for name in (arm.stage, *arm.changes):
        if name not in by_name:
            known = ", ".join(map(str, by_name))
            raise ValueError(
                f"arms.{arm.name} ({name}) must name a stage of {study.recipe}: {known}"
            )
    for name, changes in arm.changes.items():
        _merge(by_name[name], changes)
    questions = raw.get("evaluate") or {}
    asked = questions if arm.evaluate is None else arm.evaluate
    unknown = [name for name in asked if name not in questions]
    if unknown:
        raise ValueError(
            f"arms.{arm.name}.evaluate ({unknown[0]}) must be among {', '.join(questions)}"
        )
    evaluate = {name: questions[name] | {"stages": [arm.stage]} for name in asked}
    return {"stages": stages, "evaluate": evaluate}


def needed_stages(recipe: Recipe, last: str) -> list[str]:
    """Names of a stage and of all stages that it depends on, in the order of the recipe."""
    names = [stage.name for stage in recipe.stages]
    needed, pending = set(), [last]
    while pending:
        name = pending.pop()
        if name in names and name not in needed:
            needed.add(name)
            pending += recipe.stage(name).sources
    return [name for name in names if name in needed]


def _merge(target: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if value is None:
            target.pop(key, None)
        elif isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = deepcopy(value)
