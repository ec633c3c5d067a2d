"""Recipes: descriptions of training runs in YAML, validated before anything is loaded."""

from unimoe_model.training.recipe.reading import load_recipe
from unimoe_model.training.recipe.schema import (
    START,
    Assembly,
    ConnectorRecipe,
    DataFile,
    EncoderNames,
    Evaluation,
    LanguageModel,
    Parallel,
    Recipe,
    Stage,
    TrainedPart,
)

__all__ = [
    "START",
    "Assembly",
    "ConnectorRecipe",
    "DataFile",
    "EncoderNames",
    "Evaluation",
    "LanguageModel",
    "Parallel",
    "Recipe",
    "Stage",
    "TrainedPart",
    "load_recipe",
]
