"""Recipes: descriptions of training runs in YAML, validated before anything is loaded."""

from unimoe_model.training.recipe.parts import TrainedPart
from unimoe_model.training.recipe.reading import load_recipe
from unimoe_model.training.recipe.schema import (
    ConnectorRecipe,
    DataFile,
    EncoderNames,
    Evaluation,
    ImageConnectorRecipe,
    LanguageModel,
    Parallel,
    Recipe,
)
from unimoe_model.training.recipe.stage import START, Assembly, Stage

__all__ = [
    "START",
    "Assembly",
    "ConnectorRecipe",
    "DataFile",
    "EncoderNames",
    "Evaluation",
    "ImageConnectorRecipe",
    "LanguageModel",
    "Parallel",
    "Recipe",
    "Stage",
    "TrainedPart",
    "load_recipe",
]
