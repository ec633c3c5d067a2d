"""The forecast printed by `unimoe train --check`: memory, devices, tokens, time and disk."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from unimoe_model.configuration import UniMoEConfig
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.precision import multiplies_bf16
from unimoe_model.training.forecast.devices import (
    RESERVED,
    Layout,
    layouts,
    most_rows,
    peak,
)
from unimoe_model.training.forecast.disk import checkpoint_bytes, feature_bytes, model_bytes
from unimoe_model.training.forecast.samples import (
    Lengths,
    assumed_shape,
    batch_shape,
    measure,
    packed_rows,
    tokens_of,
)
from unimoe_model.training.forecast.step import BatchShape, Step, simulate_step
from unimoe_model.training.recipe import Recipe, Stage
from unimoe_model.training.recipe_data import RecipeData
from unimoe_model.training.starting_model import Start

GIB = 2**30


@dataclass(frozen=True)
class Devices:
    """Devices to forecast memory for.

    Attributes:
        numbers: numbers of devices to list in a table; empty for no table.
        memory: memory per device in GiB.
    """

    numbers: tuple[int, ...] = ()
    memory: float = 80.0

    def __post_init__(self):
        if any(number < 1 for number in self.numbers):
            raise ValueError(
                f"devices ({', '.join(map(str, self.numbers))}) must be 1 or more each"
            )
        if not 0 < self.memory < float("inf"):
            raise ValueError(f"device_memory ({self.memory}) must be above 0 GiB")


class Forecast:
    """Forecast of the requirements of a recipe's stages.

    Args:
        recipe: the recipe.
        data: data of the recipe.
        start: configuration and processor of the starting model.
        configs: configurations of all stages' models, by name.
        devices: devices to forecast memory for.
        stages: names of the stages to include.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: RecipeData,
        start: Start,
        configs: dict[str, UniMoEConfig],
        devices: Devices,
        stages: Sequence[str],
    ):
        self._stages = [recipe.stage(name) for name in stages]
        self._recipe, self._data, self._configs, self._devices = recipe, data, configs, devices
        self._counts = data.counts()
        self._on_gpu = bool(devices.numbers) or torch.cuda.is_available()
        self._start = start
        self._lengths: dict[tuple[str, int, bool], Lengths] = {}
        self._steps: dict[tuple, Step] = {}

    def lines(self, tokens_per_second: float | None, output: Path) -> Iterator[str]:
        """Yields the lines of the report.

        Args:
            tokens_per_second: training speed; None uses the speed of stages already trained in
                `output`, from their `metrics.json`.
            output: folder of the run.
        """
        yield f"  memory of one {'GPU' if self._on_gpu else 'CPU'}, {self._precision}:"
        for stage in self._stages:
            yield f"    stage {stage.name}: {self._memory(stage)}"
        yield from self._table()
        yield from self._duration(tokens_per_second, output)
        yield from self._disk()

    @property
    def _precision(self) -> str:
        if self._recipe.precision != "auto":
            return self._recipe.precision
        is_fast = self._on_gpu or multiplies_bf16(torch.device("cpu"))
        return "bf16" if is_fast else "fp32"

    def _memory(self, stage: Stage) -> str:
        parallel = self._recipe.parallel
        layout = Layout()
        if parallel is not None:
            devices = parallel.data * parallel.expert
            layout = Layout(devices, parallel.expert, parallel.shard)
        rows, has_parts = self._part(stage, layout.devices)
        step = self._step(stage, stage.optimization.gradient_checkpointing, layout)
        found = peak(step, rows, layout, has_parts)
        if stage.distill:
            found["teacher"] = self._teacher(stage)
        names = {"optimizer": "optimiser"}
        parts = ", ".join(f"{names.get(k, k)} {_gib(v)}" for k, v in found.items())
        return f"{_gib(sum(found.values()))} GiB: {parts}; {self._batch(stage, rows)}"

    def _batch(self, stage: Stage, rows: int) -> str:
        shape, is_assumed = self._shape(stage)
        assumed = " (assumed: data are missing)" if is_assumed else ""
        return f"{rows} rows of {shape.length} tokens{assumed}"

    def _table(self) -> Iterator[str]:
        if not self._devices.numbers:
            return
        limit = (1 - RESERVED) * self._devices.memory * GIB
        yield (
            f"  devices of {self._devices.memory:g} GiB: GiB of each, and the largest part_tokens"
            " that fits, without and with gradient checkpointing"
        )
        for names, stage in self._alike():
            yield f"    stage {', '.join(names)}, rows of {self._shape(stage)[0].length} tokens:"
            for number in self._devices.numbers:
                for layout in layouts(number, self._configs[stage.name].num_experts):
                    cells = [
                        f"{name} {self._cell(stage, layout, recomputes, limit)}"
                        for name, recomputes in (("without checkpointing", False), ("with", True))
                    ]
                    yield f"      {layout}: {'; '.join(cells)}"

    def _cell(self, stage: Stage, layout: Layout, recomputes: bool, limit: float) -> str:
        step, length = self._step(stage, recomputes, layout), self._shape(stage)[0].length
        batch = -(-self._batch_rows(stage) // layout.devices)
        rows, has_parts = self._part(stage, layout.devices)
        teacher = self._teacher(stage)
        used = _gib(sum(peak(step, rows, layout, has_parts).values()) + teacher)
        fitting = most_rows(step, layout, limit - teacher, batch)
        if not fitting:
            return f"{used}, does not fit"
        return f"{used}, {fitting * length:,}{' (whole batch)' if fitting == batch else ''}"

    def _teacher(self, stage: Stage) -> int:
        """Bytes of the frozen model that a stage distills from; 0 if it does not."""
        if not stage.distill:
            return 0
        with torch.device("meta"):
            model = UniMoEForConditionalGeneration(self._start.config)
        return sum(p.numel() for p in model.parameters()) * (2 if self._precision == "bf16" else 4)

    def _alike(self) -> list[tuple[list[str], Stage]]:
        """Groups of stages with the same requirements: their names, and one of the stages."""
        found: dict[tuple, tuple[list[str], Stage]] = {}
        for stage in self._stages:
            key = (*self._key(stage, False, False), self._part(stage, 1), bool(stage.distill))
            found.setdefault(key, ([], stage))[0].append(stage.name)
        return list(found.values())

    def _duration(self, tokens_per_second: float | None, output: Path) -> Iterator[str]:
        for stage in self._stages:
            if not all(self._counts[name] for name in stage.data) or self._start.processor is None:
                continue
            lengths = self._lengths_of(stage)
            tokens = tokens_of(stage, lengths, self._counts)
            rate = tokens_per_second or _measured_rate(output, stage.name)
            hours = f", {_time(tokens / rate)} at {rate:,.0f} tokens/s" if rate else ""
            yield f"  stage {stage.name}: {tokens:,} tokens{hours}"

    def _disk(self) -> Iterator[str]:
        steps = [
            self._step(s, s.optimization.gradient_checkpointing, Layout()) for s in self._stages
        ]
        features = feature_bytes(self._data, self._start.config)
        parts = [
            f"models {_size(sum(map(model_bytes, steps)))}",
            f"checkpoint {_size(max(map(checkpoint_bytes, steps)))} (twice while it is replaced)",
            *(f"{kind} features {_size(size)}" for kind, size in features.items()),
        ]
        yield f"  disk: {', '.join(parts)}"

    def _part(self, stage: Stage, devices: int) -> tuple[int, bool]:
        """Rows per part on one device, and whether a batch has several parts."""
        settings, length = stage.optimization, self._shape(stage)[0].length
        own = -(-self._batch_rows(stage) // devices)
        if stage.part_tokens is None:
            return max(1, -(-own // settings.accumulation)), settings.accumulation > 1
        rows = min(own, max(1, stage.part_tokens // length))
        return rows, rows < own

    def _batch_rows(self, stage: Stage) -> int:
        """Rows of a whole batch: its number of samples, or of packed rows."""
        if not stage.pack or self._shape(stage)[1]:
            return stage.optimization.batch_size
        return packed_rows(self._bounded(stage), self._lengths_of(stage), self._counts)

    def _shape(self, stage: Stage) -> tuple[BatchShape, bool]:
        """The shape of the largest batch, and whether it is assumed because data are missing."""
        config = self._configs[stage.name]
        if self._start.processor is None or not all(self._counts[name] for name in stage.data):
            return assumed_shape(stage, self._max_length(stage), config), True
        lengths = self._lengths_of(stage)
        return batch_shape(self._bounded(stage), lengths, self._counts, config), False

    def _bounded(self, stage: Stage) -> Stage:
        """The stage with `max_length` limited by the model's context."""
        return replace(stage, max_length=self._max_length(stage))

    def _lengths_of(self, stage: Stage) -> dict[str, Lengths]:
        most, config = self._max_length(stage), self._configs[stage.name]
        keys = {name: (name, most, name in stage.distill) for name in stage.data}
        for name, key in keys.items():
            if key not in self._lengths:
                samples = self._data.samples[name]
                self._lengths[key] = measure(samples, self._start.processor, config, *key[1:])
        return {name: self._lengths[key] for name, key in keys.items()}

    def _max_length(self, stage: Stage) -> int:
        most = self._configs[stage.name].text_config.max_position_embeddings
        return min(stage.max_length or most, most)

    def _step(self, stage: Stage, recomputes: bool, layout: Layout) -> Step:
        dispatched = layout.expert > 1
        key = self._key(stage, recomputes, dispatched)
        if key not in self._steps:
            self._steps[key] = simulate_step(
                self._configs[stage.name],
                stage.train,
                replace(stage.optimization, gradient_checkpointing=recomputes),
                self._shape(stage)[0],
                self._precision,
                "sdpa" if self._on_gpu else "eager",
                dispatched,
            )
        return self._steps[key]

    def _key(self, stage: Stage, recomputes: bool, dispatched: bool) -> tuple:
        config = json.dumps(self._configs[stage.name].to_dict(), sort_keys=True, default=str)
        muon = stage.optimization.muon_learning_rate is not None
        return config, stage.train, repr(self._shape(stage)[0]), muon, recomputes, dispatched


def _measured_rate(output: Path, stage: str) -> float | None:
    """Tokens per second of a stage that was trained in a folder; None if it was not."""
    for path in output.glob("stages/*/metrics.json"):
        if path.parent.name.rpartition("-")[0] == stage:
            metrics = json.loads(path.read_text(encoding="utf-8"))
            return metrics["tokens"] / metrics["seconds"]
    return None


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size < GIB else f"{size / GIB:.1f}"


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
