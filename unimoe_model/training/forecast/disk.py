"""Disk space of a run."""

import torch

from unimoe_model.configuration import UniMoEConfig
from unimoe_model.data.feature_store import needed_bytes
from unimoe_model.training.forecast.allocations import KINDS
from unimoe_model.training.forecast.step import Step, feature_shape
from unimoe_model.training.recipe_data import RecipeData


def feature_bytes(data: RecipeData, config: UniMoEConfig) -> dict[str, int]:
    """Bytes of the cached features of a recipe by media kind, assuming one piece per recording."""
    files = {kind: set() for kind, _ in data.media()}
    for kind, path in data.media():
        files[kind].add(path)
    return {
        kind: len(paths) * needed_bytes([feature_shape(config, kind)], torch.float16)
        for kind, paths in files.items()
    }


def model_bytes(step: Step) -> int:
    """Bytes of the model folder of a stage, unmerged LoRA included."""
    return _held(step, "weights")


def checkpoint_bytes(step: Step) -> int:
    """Bytes of a checkpoint: trained weights and their optimiser states."""
    return step.trained + _held(step, "optimizer")


def _held(step: Step, kind: str) -> int:
    return int(step.fixed[:, KINDS.index(kind)].sum(1).max())
