"""Trains the runs of a study and records their results."""

import json
import shutil
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

from unimoe_model.encoders.outside import permit_encoder
from unimoe_model.evaluation.files import file_digest
from unimoe_model.evaluation.question_routing import route_questions
from unimoe_model.evaluation.samples import asked_media
from unimoe_model.folder_lock import FolderLock
from unimoe_model.generation import Answerer
from unimoe_model.precision import resolve_precision
from unimoe_model.study.arm_recipe import arm_recipe, arm_settings, needed_stages
from unimoe_model.study.machine import machine_name, source_commit
from unimoe_model.study.plan import Arm, Study
from unimoe_model.study.progress import StudyReporter
from unimoe_model.study.record import (
    Record,
    RoutingRecord,
    read_record,
    record_path,
    write_record,
)
from unimoe_model.study.verdicts import Results
from unimoe_model.training.checkpoint import fingerprint
from unimoe_model.training.recipe import Recipe
from unimoe_model.training.recipe_data import RecipeData
from unimoe_model.training.run import Run
from unimoe_model.training.stage_ids import stage_ids
from unimoe_model.training.start import own_device


class Grid:
    """The runs of a study, in folders `OUTPUT/seed-N`, where arms share their common stages.

    Args:
        study: the study.
        output: folder of the runs.
        reporter: shows progress.

    Raises:
        ValueError: If the data of the recipe are missing or invalid.
    """

    def __init__(self, study: Study, output: Path, reporter: StudyReporter):
        self.study = study
        self.output = output
        self.metrics = study.metrics or output / "metrics"
        self._reporter = reporter
        self._device = own_device()
        whole = arm_recipe(study, Arm("", next(iter(study.arms.values())).stage), seed=0)
        for name in whole.encoder_names:
            permit_encoder(name, study.recipe.parent)
        self._data = RecipeData(whole, reporter=reporter)
        self._questions = {e.name: file_digest(Path(e.data)) for e in whole.evaluations}

    def hash_of(self, arm: Arm, recipe: Recipe) -> str:
        """Hash of everything that determines the results of an arm, except the machine."""
        ids = stage_ids(recipe, recipe.precision, self._data.digests)
        asked = [
            (e.name, self._questions[e.name], e.metric, e.max_new_tokens, e.limit)
            for e in recipe.evaluations
        ]
        return fingerprint([ids[arm.stage], asked, self.study.routed])

    def is_done(self, seed: int, arm: str) -> bool:
        """Whether the record of a run exists and has the current hash."""
        path = record_path(self.metrics, arm, seed)
        if not path.exists():
            return False
        own = self.study.arms[arm]
        return read_record(path).hash == self.hash_of(own, arm_recipe(self.study, own, seed))

    def run(self, seeds: Iterable[int] | None = None) -> None:
        """Trains and evaluates the runs that are not complete, ordered by seed.

        Args:
            seeds: only these seeds; None for all.

        Raises:
            FolderInUseError: If another process is training one of the seeds.
            StoppedError: If a signal stopped training after a checkpoint; the same call resumes.
        """
        wanted = None if seeds is None else set(seeds)
        runs = [own for own in self.study.runs() if wanted is None or own[0] in wanted]
        missing = [own for own in runs if not self.is_done(*own)]
        self._reporter.begin(len(runs), len(runs) - len(missing))
        for seed in dict.fromkeys(seed for seed, _ in missing):
            folder = self.output / f"seed-{seed}"
            arms = [self.study.arms[arm] for own, arm in missing if own == seed]
            with FolderLock(folder):
                for arm in arms:
                    self._run(folder, seed, arm)
                    self._reporter.done()

    def _run(self, folder: Path, seed: int, arm: Arm) -> None:
        self._reporter.name(f"{arm.name} {seed}")
        recipe = arm_recipe(self.study, arm, seed)
        features = self.output / "features"
        run = Run(
            recipe, self._data, folder, features, self._reporter, self._device, is_shared=True
        )
        needed = needed_stages(recipe, arm.stage)
        run.train(needed)
        accuracy, items = {}, {}
        for _, evaluation, value in run.evaluate([arm.stage]):
            accuracy[evaluation.name] = round(value, 6)
            items[evaluation.name] = len(self._data.held_out[evaluation.name])
        stages = {name: _metrics(run.folder(name)) for name in needed}
        record = Record(
            arm=arm.name,
            seed=seed,
            hash=self.hash_of(arm, recipe),
            settings=arm_settings(self.study, arm, seed),
            stage=arm.stage,
            losses=stages[arm.stage]["losses"],
            accuracy=accuracy,
            items=items,
            routing=self._routing(run, arm, recipe),
            seconds={name: round(own["seconds"], 1) for name, own in stages.items()},
            precision=resolve_precision(recipe.precision, self._device),
            machine=machine_name(self._device),
            version=version("unimoe"),
            commit=source_commit(),
        )
        write_record(self.metrics, record)
        self._forget(folder, run, arm, seed)

    def _routing(self, run: Run, arm: Arm, recipe: Recipe) -> RoutingRecord | None:
        answerer = Answerer.from_pretrained(run.folder(arm.stage) / "model")
        config = answerer.model.config
        if not config.num_experts:
            return None
        names = [e.name for e in recipe.evaluations]
        questions = [
            question
            for name in names
            for question in self._data.held_out[name][: self.study.routed]
        ]
        run.features.prepare(media for one in questions for media in asked_media(one))
        counts = route_questions(answerer, questions, run.features.item)
        taken = {kind: rows.tolist() for kind, rows in counts.taken().items()}
        experts = config.expert_origins or [str(e) for e in range(config.num_experts)]
        return RoutingRecord(counts.layers, list(experts), config.num_experts_per_tok, taken)

    def _forget(self, folder: Path, run: Run, arm: Arm, seed: int) -> None:
        """Removes the last stage of an arm unless another arm depends on it."""
        own = run.folder(arm.stage).name
        for other in self.study.arms.values():
            if other == arm or seed not in self.study.seeds_of(other.name):
                continue
            recipe = arm_recipe(self.study, other, seed)
            precision = resolve_precision(recipe.precision, self._device)
            ids = stage_ids(recipe, precision, self._data.digests)
            needed = needed_stages(recipe, other.stage)
            if own in {f"{name}-{ids[name][:8]}" for name in needed if name != other.stage}:
                return
        shutil.rmtree(folder / "stages" / own)


def read_results(
    study: Study, folder: Path, is_current: Callable[[int, str], bool] | None = None
) -> tuple[Results, list[Path]]:
    """Reads the records of a study from a folder.

    Args:
        study: the study.
        folder: folder of the records.
        is_current: whether the record of a seed and arm has the current hash, such as
            `Grid.is_done`; None compares settings alone (`arm_settings`), which requires neither
            data nor models.

    Returns:
        The records by arm and seed, and the files that were left out because their settings, or
        their models and data, differ from those of the study.

    Raises:
        ValueError: If a file is damaged.
    """
    results: dict[str, dict[int, Record]] = {}
    outdated = []
    for seed, arm in study.runs():
        path = record_path(folder, arm, seed)
        if not path.exists():
            continue
        record = read_record(path)
        same = record.settings == arm_settings(study, study.arms[arm], seed)
        if same and (is_current is None or is_current(seed, arm)):
            results.setdefault(arm, {})[seed] = record
        else:
            outdated.append(path)
    return results, outdated


def _metrics(stage: Path) -> dict:
    return json.loads((stage / "metrics.json").read_text(encoding="utf-8"))
