"""Hashes that identify stages by everything that determines their results."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unimoe_model.evaluation.files import file_digest, folder_digest
from unimoe_model.training.checkpoint import fingerprint
from unimoe_model.training.recipe import START, Recipe

# Versions of the losses: with another one, a stage is trained anew.
_WORDS, _DISTILL = 4, 2


def stage_ids(recipe: Recipe, precision: str, digests: Mapping[str, str]) -> dict[str, str]:
    """A hash for each stage, of its settings and of everything that it starts from.

    It does not depend on the number of processes or the location of files.

    Args:
        recipe: the recipe.
        precision: `"bf16"` or `"fp32"`.
        digests: hash of each data entry with its media.

    Returns:
        16 hexadecimal digits by stage name.
    """
    ids = {START: fingerprint(_start_facts(recipe, precision, digests))}
    for stage in recipe.stages:
        facts = asdict(stage)
        for key in ("name", "parent"):
            del facts[key]
        # Defaults count as missing, so that a recipe without these keys keeps its hashes.
        if stage.objective == "answers":
            del facts["objective"]
        else:
            facts["words"] = _WORDS
        if stage.distill:
            facts["distillation"] = _DISTILL
        else:
            del facts["distill"], facts["distill_weight"]
        if not stage.image_dropout:
            del facts["image_dropout"]
        facts["sources"] = [ids[name] for name in stage.sources]
        facts["data"] = [(digests[name], recipe.data[name].shuffle) for name in stage.data]
        ids[stage.name] = fingerprint(facts)
    del ids[START]
    return ids


def _start_facts(recipe: Recipe, precision: str, digests: Mapping[str, str]) -> dict[str, Any]:
    facts = {
        "seed": recipe.seed,
        "precision": precision,
        "model": {k: _content(v) for k, v in asdict(recipe.model).items()},
        "encoders": {k: _content(v) for k, v in asdict(recipe.encoders).items()},
        "speech": {k: _content(v) for k, v in asdict(recipe.speech).items()},
        "audio": {k: _content(v) for k, v in asdict(recipe.audio).items()},
        "video_frames": recipe.video_frames,
    }
    # Defaults count as missing here too.
    image = {key: value for key, value in asdict(recipe.image).items() if value is not None}
    if image:
        facts["image"] = image
    if recipe.vocabulary_sharpness is not None:
        facts["vocabulary_sharpness"] = recipe.vocabulary_sharpness
    if recipe.model.vocab_size is not None:
        facts["tokenizer"] = dict(digests)
    return facts


def _content(value: Any) -> Any:
    """The hash of the file or folder that a value names, else the value itself."""
    if isinstance(value, str) and Path(value).exists():
        path = Path(value)
        return folder_digest(path) if path.is_dir() else file_digest(path)
    return value
