"""The recipe of each arm, built from smol.yaml and the available data."""

from collections.abc import Collection
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
ARMS = ("moe", "dynamic", "dense")
EXPERTS = ("pictures", "speech", "sounds", "text")
_QUICK_STEPS = 3


def write_recipe(
    folder: Path, arm: str, seed: int, quick: bool = False, share: float = 1.0
) -> Path:
    """Writes the recipe of an arm into a folder, next to `data`, and returns its path.

    Data and held-out questions whose file does not exist are left out.

    Args:
        folder: folder that contains `data`.
        arm: one of `ARMS`.
        seed: seed, part of the file name, after which the folder of the run is named.
        quick: whether to run only a few steps of each stage.
        share: fraction of the steps of each stage to run.

    Raises:
        ValueError: If a stage is left without data.
    """
    there = {
        split: {path.stem for path in (folder / "data" / split).glob("*.jsonl")}
        for split in ("train", "test")
    }
    recipe = arm_recipe(arm, share)
    recipe = _with_data(recipe, there["train"], there["test"])
    if quick:
        for stage in recipe["stages"]:
            stage["steps"] = _QUICK_STEPS
    path = folder / f"{arm}-{seed}.yaml"
    text = yaml.safe_dump(recipe, sort_keys=False, width=100)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return path


def arm_recipe(arm: str, share: float = 1.0) -> dict[str, Any]:
    """Returns the recipe of an arm with all data.

    Args:
        arm: one of `ARMS`.
        share: fraction of the steps of each stage to run; at least one step is run.

    Raises:
        ValueError: If `arm` is unknown.
    """
    if arm not in ARMS:
        raise ValueError(f"arm ({arm!r}) must be one of {', '.join(ARMS)}")
    recipe = yaml.safe_load((HERE / "smol.yaml").read_text(encoding="utf-8"))
    for stage in recipe["stages"]:
        stage["steps"] = max(1, round(share * stage["steps"]))
    changed = {"moe": lambda recipe: recipe, "dynamic": _dynamic, "dense": _dense}[arm]
    return changed(recipe)


def _dynamic(recipe: dict[str, Any]) -> dict[str, Any]:
    changes = yaml.safe_load((HERE / "dynamic.yaml").read_text(encoding="utf-8"))
    for stage in recipe["stages"]:
        if stage["name"] in changes["stages"]:
            stage["assemble"] |= changes["stages"][stage["name"]]["assemble"]
    return recipe


def _dense(recipe: dict[str, Any]) -> dict[str, Any]:
    changes = yaml.safe_load((HERE / "dense.yaml").read_text(encoding="utf-8"))
    stages = {stage["name"]: stage for stage in recipe["stages"]}
    experts = deepcopy(stages[EXPERTS[0]])
    # As much of each data as in the stages of all experts.
    experts["data"] = {}
    for name in EXPERTS:
        total = sum(stages[name]["data"].values())
        for data, weight in stages[name]["data"].items():
            share = round(stages[name]["steps"] * weight / total, 3)
            experts["data"][data] = experts["data"].get(data, 0) + share
    experts["steps"] = sum(stages[name]["steps"] for name in EXPERTS)
    experts["distill"] = [one for name in EXPERTS for one in stages[name].get("distill", [])]
    tune = stages["tune"]
    del tune["assemble"]
    tune["from"] = "experts"
    own = {"words": stages["words"], "align": stages["align"], "experts": experts, "tune": tune}
    recipe["stages"] = [
        stage | {"name": name} | changes["stages"][name] for name, stage in own.items()
    ]
    return recipe


def _with_data(
    recipe: dict[str, Any], train: Collection[str], test: Collection[str]
) -> dict[str, Any]:
    recipe["data"] = {name: file for name, file in recipe["data"].items() if name in train}
    for stage in recipe["stages"]:
        kept = {name: weight for name, weight in stage["data"].items() if name in train}
        if not kept:
            raise ValueError(
                f"stage {stage['name']} has no data: none of {list(stage['data'])} is there"
            )
        stage["data"] = kept
        if "distill" in stage:
            stage["distill"] = [name for name in stage["distill"] if name in train]
    recipe["evaluate"] = {
        name: own for name, own in recipe["evaluate"].items() if Path(own["data"]).stem in test
    }
    return recipe
