"""The demo's variants, and the recipes of their arms."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from examples.demo.limits import DataLimits

HERE = Path(__file__).parent
ARMS = ("moe", "dense")
SHARED = "align"
"""The stage that both arms share, unless each pretrains its own language model."""


@dataclass(frozen=True)
class Variant:
    """Length of a demo.

    Attributes:
        limits: maximum number of training items of each media set.
        held_out: maximum number of held-out items by task; all for tasks that are not named.
        share: share of the recipes' steps to train.
        is_full: whether each arm pretrains its own language model.
        is_forecast: whether to forecast the duration first.
    """

    limits: DataLimits
    held_out: dict[str, int] = field(default_factory=dict)
    share: float = 1.0
    is_full: bool = False
    is_forecast: bool = True


TASKS = ("image_qa", "spoken_word", "spoken_question", "sound", "video", "text")
"""The six tasks of the table, in order."""

VARIANTS = {
    "demo": Variant(DataLimits(pictures=2400, questions=1200, sounds=1280, videos=1200)),
    "full": Variant(DataLimits(), {"text": 1000}, is_full=True),
    "quick": Variant(
        DataLimits(400, 150, 150, 240, 160), dict.fromkeys(TASKS, 60), 0.25, is_forecast=False
    ),
}


def write_recipes(output: Path, variant: Variant) -> dict[str, Path]:
    """Writes the recipe of each arm to the output folder; returns the files by arm."""
    files = {}
    for arm in ARMS:
        recipe = yaml.safe_load((HERE / f"{arm}.yaml").read_text(encoding="utf-8"))
        if variant.is_full:
            recipe = _full(recipe, arm)
        if recipe["model"] == "LANGUAGE_MODEL":
            recipe["model"] = str(HERE / "language_model")
        for stage in recipe["stages"]:
            stage["steps"] = max(4, round(stage["steps"] * variant.share))
        files[arm] = output / f"{arm}.yaml"
        text = yaml.safe_dump(recipe, sort_keys=False, width=100)
        if not files[arm].exists() or files[arm].read_text(encoding="utf-8") != text:
            files[arm].write_text(text, encoding="utf-8")
    return files


def language_model_recipe(data: Sequence[str]) -> dict[str, Any]:
    """The recipe that only pretrains the language model, on `data/train/NAME.jsonl`."""
    recipe = _full(yaml.safe_load((HERE / "moe.yaml").read_text(encoding="utf-8")), "moe")
    recipe["data"] = {name: f"data/train/{name}.jsonl" for name in data}
    recipe["stages"] = recipe["stages"][:1]
    recipe["evaluate"] = {"text": recipe["evaluate"]["text"]}
    return recipe


def fill_in_aligned(recipe: Path, model: Path) -> None:
    """Makes the dense arm's recipe start from the result of the MoE's stage 1."""
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace("model: ALIGNED", f"model: {model.resolve()}"), encoding="utf-8")


def _full(recipe: dict[str, Any], arm: str) -> dict[str, Any]:
    changes = yaml.safe_load((HERE / "full.yaml").read_text(encoding="utf-8"))
    moe = yaml.safe_load((HERE / "moe.yaml").read_text(encoding="utf-8"))
    model = changes["model"]
    if arm == "dense":
        model["sizes"]["intermediate_size"] *= 2
        align = next(stage for stage in moe["stages"] if stage["name"] == SHARED)
        recipe["stages"].insert(0, deepcopy(align))
        for stage in recipe["stages"]:
            stage.pop("widen", None)
        recipe["connectors"] = moe["connectors"]
        recipe["data"] = moe["data"]
    recipe["model"] = model
    recipe["data"] |= {name: f"data/train/{name}.jsonl" for name in changes["data"]}
    for stage in recipe["stages"]:
        stage |= changes["stages"][stage["name"]]
    recipe["stages"].insert(0, changes["first"])
    return recipe
