"""`unimoe train`: a recipe from reading to the model folder."""

import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from unimoe_kernels.distributed import attributed, finish_parallel
from unimoe_model.configuration import UniMoEConfig
from unimoe_model.encoders.outside import permit_encoder
from unimoe_model.evaluation.metrics import METRICS
from unimoe_model.folder_lock import FolderLock
from unimoe_model.training.check import check_recipe
from unimoe_model.training.forecast.report import Devices, Forecast
from unimoe_model.training.progress import SilentReporter, own_reporter
from unimoe_model.training.recipe import Recipe, load_recipe
from unimoe_model.training.recipe_data import RecipeData
from unimoe_model.training.run import Run, keep_recipe
from unimoe_model.training.start import own_device, start_ranks
from unimoe_model.training.starting_model import Start
from unimoe_model.value_types import require_positive


def train_recipe(
    path: Path,
    output: Path,
    features: Path | None = None,
    *,
    stage: str | None = None,
    from_stage: str | None = None,
    check: bool = False,
    devices: Sequence[int] = (),
    device_memory: float | None = None,
    tokens_per_second: float | None = None,
    **overrides: Any,
) -> Path | None:
    """Trains what a recipe describes, and prints scores and where the model is.

    Args:
        path: the recipe.
        output: folder of the run.
        features: cache of features; None is `features` in the output.
        stage: train this one alone.
        from_stage: train this one and those after it.
        check: only list what would be done, and what it needs.
        devices: numbers of devices that the list says what fits on; with `check` alone.
        device_memory: GiB of one of them, 80 unless given.
        tokens_per_second: of training, for the hours of the list.
        **overrides: top-level values that replace the recipe's.

    Returns:
        The folder of the model; None with `check`, and in processes other than the first.

    Raises:
        ValueError: For a bad recipe, data, or output, before anything is written.
        StoppedError: If a signal ended the run after a checkpoint.
    """
    if not check and (devices or device_memory or tokens_per_second):
        raise ValueError("devices, device_memory and tokens_per_second are for check alone")
    own = Devices(tuple(devices), 80.0 if device_memory is None else device_memory)
    require_positive(tokens_per_second=tokens_per_second)
    recipe = load_recipe(path, **overrides)
    for name in recipe.encoder_names:
        permit_encoder(name, path.parent)
    stages = _chosen(recipe, stage, from_stage)
    disable_progress_bar()  # of transformers, for what takes a moment
    reporter = own_reporter() if os.environ.get("RANK", "0") == "0" else SilentReporter()
    if check:
        missing: list[str] = []
        data = RecipeData(recipe, missing, reporter)

        def needs(start: Start, configs: dict[str, UniMoEConfig]) -> Iterator[str]:
            forecast = Forecast(recipe, data, start, configs, own, stages)
            return forecast.lines(tokens_per_second, output)

        for line in check_recipe(recipe, data, missing, needs):
            print(line)
        return None
    data = RecipeData(recipe, reporter=reporter)
    for _ in check_recipe(recipe, data):
        pass  # raises for what does not fit together, before anything is written
    device = own_device()
    mesh = start_ranks(recipe, device)
    is_first = mesh is None or mesh.get_rank() == 0
    with (
        attributed(f"training of {output}"),
        FolderLock(output) if is_first else nullcontext(),
    ):
        features = features or output / "features"
        run = Run(recipe, data, output, features, reporter, device, mesh)
        if is_first:
            keep_recipe(recipe, output, overrides)
        if mesh is None:
            for name in stages:
                run.train([name])
                _print_scores(run, [name])
        else:
            run.train(stages)
            finish_parallel()
            if not is_first:
                return None
            _print_scores(run, stages)
        # A stage that is trained alone does not take the place of a later one.
        target = run.publish([s.name for s in recipe.stages if run.is_done(s.name)][-1])
    print(f"model in {target}")
    return target


def _chosen(recipe: Recipe, stage: str | None, from_stage: str | None) -> list[str]:
    names = [s.name for s in recipe.stages]
    for option, name in (("stage", stage), ("from-stage", from_stage)):
        if name is not None and name not in names:
            raise ValueError(f"--{option} ({name}) must be a stage of {recipe.path}: {names}")
    if stage is not None:
        return [stage]
    return names[names.index(from_stage) :] if from_stage else names


def _print_scores(run: Run, stages: list[str]) -> None:
    for stage, evaluation, value in run.evaluate(stages):
        metric = METRICS[evaluation.metric]
        print(f"{stage}: {evaluation.name} {metric.title} {100 * value:.2f}{metric.unit}")
