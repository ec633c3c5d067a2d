"""Training of a recipe from start to finish, run by `unimoe train`."""

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
    """Trains the model of a recipe; prints evaluation scores and the folder of the model.

    Args:
        path: recipe file.
        output: folder of the run.
        features: folder of the feature cache; None for `features` in the output.
        stage: name of the only stage to train.
        from_stage: name of the first stage to train.
        check: whether to check the recipe and print a summary and a forecast instead of training.
        devices: numbers of devices to forecast memory for; requires `check`.
        device_memory: memory per device in GiB, 80 by default; requires `check`.
        tokens_per_second: training speed for the forecast of time; requires `check`.
        **overrides: top-level values that replace those of the recipe.

    Returns:
        The folder of the model; None with `check`, and in processes other than the first.

    Raises:
        ValueError: If the recipe, its data or the output is invalid; nothing is written.
        StoppedError: If a signal ended the run after a checkpoint.
    """
    if not check and (devices or device_memory or tokens_per_second):
        raise ValueError("devices, device_memory and tokens_per_second require check")
    own = Devices(tuple(devices), 80.0 if device_memory is None else device_memory)
    require_positive(tokens_per_second=tokens_per_second)
    recipe = load_recipe(path, **overrides)
    for name in recipe.encoder_names:
        permit_encoder(name, path.parent)
    stages = _chosen(recipe, stage, from_stage)
    disable_progress_bar()  # the bars of transformers, for short operations
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
        pass  # raises for inconsistent settings before anything is written
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
        # A stage that was trained alone does not replace the model of a later one.
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
