"""Validation and summary of a recipe without loading weights, run by `unimoe train --check`."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from unimoe_model.configuration import UniMoEConfig
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.training.recipe import START, Recipe, Stage
from unimoe_model.training.recipe_data import RecipeData
from unimoe_model.training.stage_model import kept_parts
from unimoe_model.training.starting_model import Start, describe_start
from unimoe_model.training.trained import count_trained
from unimoe_model.training.widening import widened


def check_recipe(
    recipe: Recipe,
    data: RecipeData,
    missing: list[str] | None = None,
    needs: Callable[[Start, dict[str, UniMoEConfig]], Iterable[str]] | None = None,
) -> Iterator[str]:
    """Yields lines that list stages, their data, and trained and total parameters.

    Models are built on the meta device, without allocating memory.

    Args:
        recipe: the recipe.
        data: data of the recipe.
        missing: missing files and folders found so far; further ones are appended. None raises an
            error for missing ones.
        needs: yields further lines, given the start and the configurations of all stages.

    Raises:
        ValueError: For the first error in the recipe, as in training.
    """
    counts = data.counts()
    yield f"recipe {recipe.path}"
    for name, file in recipe.data.items():
        kinds = data.kinds[name].items()
        media = ", ".join(f"{number} {kind}" for kind, number in kinds) or "no media"
        place = file.file or f"{len(data.samples[name].parts)} shards"
        yield f"  data {name}: {counts[name]} samples, {media} ({place})"
    start = describe_start(recipe, data.texts(), missing)
    yield f"  model: {start.config.text_config.model_type}{_prompts(start)}"
    for sense in ("vision", "speech", "audio"):
        width = getattr(start.config, f"{sense}_feature_size")
        yield f"  encoder {sense}: {getattr(start.config, f'{sense}_encoder')}, {width} features"
    configs = {START: start.config}
    for stage in recipe.stages:
        _require_media(recipe, stage, data)
        config = configs[stage.name] = stage_config(stage, configs)
        _require_divisible(recipe, stage, config.num_experts)
        _require_losses_of_tokens(recipe, stage, config)
        with torch.device("meta"):
            model = UniMoEForConditionalGeneration(config)
        try:
            if stage.assembly is not None:
                kept_parts(recipe, stage, dict(model.named_parameters()))
            trained, total = count_trained(model, stage.train)
        except ValueError as error:
            raise ValueError(f"{recipe.path}: stages.{stage.name}: {error}") from error
        settings = stage.optimization_for(counts)
        steps = f"{settings.steps} steps" if stage.epochs is None else f"{stage.epochs:g} epochs"
        experts = f", experts {', '.join(stage.assembly.experts)}" if stage.assembly else ""
        yield (
            f"  stage {stage.name}: from {stage.parent}{experts}; {steps} of"
            f" {settings.batch_size}; trains {trained:,} of {total:,} parameters"
        )
    for evaluation in recipe.evaluations:
        yield (
            f"  evaluate {evaluation.name}: {evaluation.metric} after"
            f" {', '.join(evaluation.stages)} ({Path(evaluation.data)})"
        )
    if needs is not None:
        yield from needs(start, configs)
    for line in missing or ():
        yield f"  missing: {line}"


def _prompts(start: Start) -> str:
    if start.processor is None:
        return ""
    names = {"chat": "in the tokenizer's chat template", "vicuna": "as published"}
    return f", prompts {names[start.processor.prompt_format]}"


def _require_media(recipe: Recipe, stage: Stage, data: RecipeData) -> None:
    """Raises ValueError if a stage trains a connector for which its data have no media."""
    if not all(data.samples[name] for name in stage.data):
        return  # missing files are listed separately
    held = {kind for name in stage.data for kind in data.kinds[name]}
    read = {"image" if kind == "video" else kind for kind in held}
    for part in stage.train:
        base, dot, kind = part.part.partition(".")
        if base in ("connectors", "projectors") and (kind not in read if dot else not read):
            raise ValueError(
                f"{recipe.path}: stages.{stage.name}.train ({part.part}) requires"
                f" {kind or 'media'} in the data of the stage; {', '.join(stage.data)} hold"
                f" {', '.join(sorted(held)) or 'none'}"
            )


def _require_divisible(recipe: Recipe, stage: Stage, num_experts: int) -> None:
    """Raises ValueError if the processes of `parallel` cannot share the experts of a stage."""
    share = recipe.parallel.expert if recipe.parallel else 1
    if num_experts % share:
        raise ValueError(
            f"{recipe.path}: stages.{stage.name}: experts ({num_experts}) must be a multiple of"
            f" parallel.expert ({share})"
        )


def _require_losses_of_tokens(recipe: Recipe, stage: Stage, config: UniMoEConfig) -> None:
    """Raises ValueError if rows are packed and the model has losses that are means over a row."""
    for name in ("modality_expert_coef", "modality_kl_coef"):
        value = getattr(config, name)
        if stage.pack and value:
            raise ValueError(
                f"{recipe.path}: stages.{stage.name}: pack requires {name} ({value}) to be 0; its"
                " loss is a mean of each row, which must hold one sample then"
            )


def stage_config(stage: Stage, configs: dict[str, UniMoEConfig]) -> UniMoEConfig:
    """Configuration of the model that a stage trains.

    Args:
        stage: the stage.
        configs: configurations of the start and of all earlier stages, by name.

    Raises:
        ValueError: If experts are assembled from a model that already has experts.
    """
    config = configs[stage.parent]
    fields = config.to_dict()
    if stage.widen > 1:
        own = fields["text_config"]["intermediate_size"]
        fields["text_config"]["intermediate_size"] = widened(own, stage.widen)
    if stage.assembly is None:
        return UniMoEConfig.from_dict(fields)
    for name in (stage.parent, *stage.assembly.experts):
        if configs[name].num_experts:
            raise ValueError(
                f"stages.{stage.name}.assemble: {name} has {configs[name].num_experts} experts"
                " already, expected a dense model"
            )
    return UniMoEConfig.from_dict(
        fields
        | {
            "num_experts": len(stage.assembly.experts),
            "num_experts_per_tok": stage.assembly.top_k,
            "moe_layers": stage.assembly.layers,
            "expert_origins": list(stage.assembly.experts),
            **stage.assembly.options,
        }
    )
