"""Execution of a recipe: a stage is repeated only if something that determines it has changed."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from unimoe_kernels import recover_folder, replace_folder
from unimoe_model.data.indexed_files import Media
from unimoe_model.evaluation.files import write_whole
from unimoe_model.evaluation.samples import asked_media
from unimoe_model.evaluation.scoring import evaluate_file
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.precision import resolve_precision
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.training.assemble import merge_and_unload_lora
from unimoe_model.training.batches import Batches, sample_order
from unimoe_model.training.checkpoint import completed_run
from unimoe_model.training.features import MediaFeatures
from unimoe_model.training.gradients import Objective
from unimoe_model.training.loop import finish_stage, train_stage
from unimoe_model.training.progress import ProgressReporter
from unimoe_model.training.ranks import Ranks
from unimoe_model.training.recipe import Evaluation, Recipe, Stage
from unimoe_model.training.recipe.parts import trains_body
from unimoe_model.training.recipe_data import RecipeData
from unimoe_model.training.stage_ids import stage_ids
from unimoe_model.training.stage_model import ROUTER_BATCHES, stage_model
from unimoe_model.training.starting_model import build_start, describe_start
from unimoe_model.training.trained import select_trained
from unimoe_model.training.word_loss import Vocabulary

_BODIES = ("speech", "audio")
EVALUATED_AT_ONCE = 32
"""Batch size of evaluations."""
_LENGTH_MULTIPLE, _LOGITS_MULTIPLE = 32, 64
"""Multiples that the length of packed rows and the rows of logits are padded to on a CPU.

Few sizes let a step reuse the memory of the last, and glibc find it quickly where the caching
allocator cannot be used. The allocator of CUDA GPUs rounds sizes itself."""


class Run:
    """Trains the stages of a recipe in a folder, which the caller locks with `FolderLock`.

    Args:
        recipe: the recipe.
        data: data of the recipe.
        output: folder of the run.
        features: folder of the feature cache.
        reporter: shows progress.
        device: device to train on.
        mesh: mesh of the processes that train together; None for a single process.
        is_shared: whether the output may hold runs of other recipes.

    Attributes:
        ids: hash of each stage, by name (`stage_ids`).
        processor: processor of the model.
        features: features of the media.

    Raises:
        ValueError: If the output holds the run of another recipe and is not shared, or the starting
            model is invalid (`describe_start`).
    """

    def __init__(
        self,
        recipe: Recipe,
        data: RecipeData,
        output: Path,
        features: Path,
        reporter: ProgressReporter,
        device: torch.device,
        mesh: DeviceMesh | None = None,
        is_shared: bool = False,
    ):
        self._recipe = recipe
        self._data = data
        self._output = output
        self._reporter = reporter
        self._device = device
        self._ranks = Ranks(mesh, shard=bool(recipe.parallel and recipe.parallel.shard))
        self._precision = resolve_precision(recipe.precision, device)
        self.ids = stage_ids(recipe, self._precision, data.digests)
        if not is_shared:
            self._check_output()
        self._start = describe_start(recipe, data.texts())
        self.processor: UniMoEProcessor = self._start.processor
        self.features = MediaFeatures(
            self.processor, features, device, self._precision, reporter, self._ranks
        )

    def folder(self, stage: str) -> Path:
        """Folder of a stage's files, with its model in the subfolder `model`."""
        return self._output / "stages" / f"{stage}-{self.ids[stage][:8]}"

    def is_done(self, stage: str) -> bool:
        """Whether a stage is complete."""
        folder = self.folder(stage)
        return (folder / "model" / "config.json").is_file() and completed_run(
            folder, self.ids[stage]
        )

    def encode(self) -> None:
        """Computes the features of all media of the recipe; all processes must call it."""
        self.features.prepare(self._data.media())

    def train(self, stages: Sequence[str]) -> Path:
        """Trains the stages that are not complete, in order; returns the last one's model folder.

        Raises:
            ValueError: If a stage that one of them starts from is not complete, or data are
                invalid.
            StoppedError: If a signal ended it after a checkpoint.
        """
        for name in stages:
            stage = self._recipe.stage(name)
            if self.is_done(name):
                self._check_inputs(stage)
                continue
            missing = [s for s in stage.sources if s in self.ids and not self.is_done(s)]
            if missing:
                raise ValueError(
                    f"stage {name} starts from {missing[0]}, which is not done in {self._output}"
                )
            self._train(stage)
        return self.folder(stages[-1]) / "model"

    def evaluate(self, stages: Sequence[str]) -> list[tuple[str, Evaluation, float]]:
        """Evaluates completed stages; returns tuples of stage, evaluation and value.

        Called by one process, after the others have ended.
        """
        self.features.leave_ranks()
        scores = []
        for stage in stages:
            for evaluation in self._recipe.evaluations:
                if stage in evaluation.stages:
                    questions = self._data.held_out[evaluation.name]
                    self.features.prepare(m for asked in questions for m in asked_media(asked))
                    score = evaluate_file(
                        self.folder(stage) / "model",
                        Path(evaluation.data),
                        evaluation.metric,
                        self.folder(stage) / "eval" / evaluation.name,
                        evaluation.max_new_tokens,
                        evaluation.limit,
                        self._reporter,
                        EVALUATED_AT_ONCE,
                        self.features.item,
                        self.features.identity,
                    )
                    scores.append((stage, evaluation, score.value))
        return scores

    def publish(self, stage: str, folder: Path | None = None) -> Path:
        """Publishes a stage's model as `model` in a folder, with hard links where possible.

        Args:
            stage: name of a completed stage.
            folder: existing folder; None for the output of the run.

        Returns:
            Folder of the published model.
        """
        folder = folder or self._output
        target, fresh = folder / "model", folder / "model.new"
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(self.folder(stage) / "model", fresh, copy_function=_link_or_copy)
        replace_folder(target, fresh)
        return target

    def _train(self, stage: Stage) -> None:
        folder, run = self.folder(stage.name), self.ids[stage.name]
        if self._ranks.is_first:
            folder.mkdir(parents=True, exist_ok=True)
        self._ranks.wait(f"start of {stage.name}")
        settings = stage.optimization_for(self._data.counts())
        used = self._used(stage, settings.steps)
        self.features.prepare(used)
        self._check_inputs(stage, used)
        if stage.assembly is not None and stage.assembly.router_strength:
            for expert in stage.assembly.experts:
                self.features.prepare(self._used(self._recipe.stage(expert), ROUTER_BATCHES))
        model = stage_model(
            self._recipe, stage, self._start_model, self._folders(stage), self._whole, self._device
        )
        self._set_attention(model)
        frozen = [kind for kind in _BODIES if not trains_body(stage.train, kind)]
        self.features.use_query_states(frozen, model, used)
        torch.manual_seed(self._recipe.seed + 2)
        parameters = select_trained(model, stage.train)
        model.to(self._device)
        progress = train_stage(
            model,
            parameters,
            self._batches(stage, self._ranks),
            settings,
            folder,
            run,
            stage.name,
            self._reporter,
            self._objective(stage, model),
            checkpoint_seconds=self._recipe.checkpoint_seconds,
            ranks=self._ranks,
            workers=self._recipe.workers,
        )
        model = self._ranks.unite(model)
        if self._ranks.is_first:
            if any(part.rank for part in stage.train):
                merge_and_unload_lora(model)
            self._save(model, folder)
            finish_stage(folder, run, settings, progress)
        self._ranks.wait(f"end of {stage.name}")

    def _objective(self, stage: Stage, model: UniMoEForConditionalGeneration) -> Objective:
        vocabulary = None
        if stage.objective == "words":
            vocabulary = Vocabulary.of(model, torch.bfloat16 if self._precision == "bf16" else None)
        return Objective(
            stage.objective,
            self._precision,
            teacher=self._teacher() if stage.distill else None,
            pad_to_multiple_of=_LOGITS_MULTIPLE if self._device.type == "cpu" else 1,
            image_dropout=stage.image_dropout,
            vocabulary=vocabulary,
        )

    def _check_inputs(self, stage: Stage, used: Sequence[tuple[str, Media]] | None = None) -> None:
        """Refuses to resume or reuse a stage whose media or encoders have changed.

        Their hash is written when a stage starts. The id of a stage covers only names and sizes of
        media and names of encoders, because it must be known before any of them is read.
        """
        failure = None
        if self._ranks.is_first:
            try:
                self._compare_inputs(stage, used)
            except (ValueError, OSError) as error:
                failure = error
        if any(self._ranks.sums(f"media of {stage.name}", float(failure is not None))):
            raise failure or RuntimeError(f"media of {stage.name} differ, on the first process")

    def _compare_inputs(self, stage: Stage, used: Sequence[tuple[str, Media]] | None) -> None:
        folder = self.folder(stage.name)
        path, fresh = folder / "inputs.json", used is not None
        started = any(folder.glob("checkpoint*"))
        if not path.exists() and not fresh:
            return
        if used is None:
            used = self._used(stage, stage.optimization_for(self._data.counts()).steps)
        found = {"media_and_encoders": self.features.identity(used)}
        if path.exists() and (started or not fresh):
            if json.loads(path.read_text(encoding="utf-8")) != found:
                raise ValueError(
                    f"{folder} holds a stage that was trained with other media or encoders of the"
                    " same names; give another output folder, or delete it"
                )
        elif fresh:
            write_whole(path, json.dumps(found))

    def _save(self, model: UniMoEForConditionalGeneration, folder: Path) -> None:
        model.set_attn_implementation("sdpa")
        model.requires_grad_(False).eval()
        target, fresh = folder / "model", folder / "model.new"
        recover_folder(target)
        shutil.rmtree(fresh, ignore_errors=True)
        model.save_pretrained(fresh)
        self.processor.save_pretrained(fresh)
        replace_folder(target, fresh)

    def _start_model(self) -> UniMoEForConditionalGeneration:
        return build_start(self._recipe, self._start)

    def _teacher(self) -> UniMoEForConditionalGeneration:
        """The frozen model that the recipe starts from, in the precision of training."""
        model = self._start_model()
        self._set_attention(model)
        dtype = torch.bfloat16 if self._precision == "bf16" else torch.float32
        return model.requires_grad_(False).eval().to(self._device, dtype)

    def _folders(self, stage: Stage) -> dict[str, Path]:
        return {name: self.folder(name) / "model" for name in stage.sources if name in self.ids}

    def _batches(self, stage: Stage, ranks: Ranks | None) -> Batches:
        most = self._start.config.text_config.max_position_embeddings
        return Batches(
            self.processor,
            sample_order(stage, self._data.samples, self._recipe.seed, self._data.shuffles),
            replace(stage, max_length=min(stage.max_length or most, most)),
            stage.optimization_for(self._data.counts()),
            self.features.item,
            ranks,
            _LENGTH_MULTIPLE if self._device.type == "cpu" else 1,
        )

    def _whole(self, stage: str, step: int) -> dict:
        return self._batches(self._recipe.stage(stage), None).whole(step)

    def _used(self, stage: Stage, steps: int) -> list[tuple[str, Media]]:
        """Media of the samples in the first batches of a stage, in order of first use."""
        batches = self._batches(stage, None)
        samples = {name: self._data.samples[name] for name in stage.data if self._data.kinds[name]}
        unseen = {name: np.ones(len(held), bool) for name, held in samples.items()}
        left, media = sum(map(len, samples.values())), {}
        for step in range(steps):
            if not left:
                break
            for name, index in batches.places(step):
                if name in samples and unseen[name][index]:
                    unseen[name][index] = False
                    left -= 1
                    media |= dict.fromkeys(samples[name][index].media)
        return list(media)

    def _set_attention(self, model: UniMoEForConditionalGeneration) -> None:
        """Selects eager attention on CPUs.

        There the backward of torch's fused attention takes 14 ms per layer on 64 texts of 31
        tokens, that of matmuls and softmax less than 1 ms.
        """
        model.set_attn_implementation("eager" if self._device.type == "cpu" else "sdpa")

    def _check_output(self) -> None:
        stages = self._output / "stages"
        found = {path.name for path in stages.iterdir()} if stages.is_dir() else set()
        if found and not found & {self.folder(name).name for name in self.ids}:
            raise ValueError(
                f"output ({self._output}) holds the run of another recipe: no stage of"
                f" {self._recipe.path} is among {sorted(found)}; give another output, or delete it"
            )


def keep_recipe(recipe: Recipe, output: Path, overrides: Mapping[str, Any]) -> None:
    """Copies the recipe into the folder of its run, with overrides in comments at the top."""
    given = "".join(f"# --{name} {value}\n" for name, value in overrides.items())
    text = Path(recipe.path).read_text(encoding="utf-8")
    write_whole(output / "recipe.yaml", given + text)


def _link_or_copy(source: str, target: str) -> None:
    """Creates a hard link, or a copy if the file system does not support them."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
