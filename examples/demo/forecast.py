"""Forecast of the duration of a run, from a rehearsal with few items and few steps."""

import json
import shutil
import time
from collections import defaultdict
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
import yaml

from examples.demo.machine import Machine
from examples.demo.parts import open_run
from unimoe_model.configuration import MEDIA_KINDS
from unimoe_model.training.features import BATCHES
from unimoe_model.training.progress import SilentReporter

_STEPS = 4
_ASKED, _NEW_TOKENS = 96, 3
"""Questions, and a limit on tokens, because an untrained model does not end its outputs."""
_ARMS = 2


class _Times(SilentReporter):
    """Records seconds and units of every advance, by title; the first of a title is a warm-up."""

    def __init__(self):
        self._title, self._last = "", 0.0
        self._advances: dict[str, list[tuple[float, int]]] = defaultdict(list)

    def start(self, stage: str, total: int, done: int) -> None:
        """Starts a title."""
        self._title, self._last = stage, time.monotonic()

    def advance(self, steps: int, **figures: str) -> None:
        """Records the time."""
        now = time.monotonic()
        self._advances[self._title].append((now - self._last, steps))
        self._last = now

    def of(self, title: str) -> float:
        """Seconds per unit; 0 for titles that did not occur."""
        taken = self._advances[title][1:] or self._advances[title]
        return sum(t for t, _ in taken) / max(1, sum(n for _, n in taken))


@dataclass(frozen=True)
class Forecast:
    """Remaining seconds of the parts of a run.

    Attributes:
        seconds: by part, in order; completed parts are left out.
    """

    seconds: dict[str, float]

    @property
    def total(self) -> float:
        """Total seconds."""
        return sum(self.seconds.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_clock(value)}" for name, value in self.seconds.items())
        return f"about {_clock(self.total)} in all: {parts}"


def forecast(recipe: Path, seed: int, output: Path, machine: Machine) -> Forecast:
    """Rehearses a run with few items and few steps, and scales the times.

    Encoders, stages and generation are the real ones. The MoE arm is rehearsed alone on its share
    of the threads; in the run the dense arm, which is faster, runs beside it.

    Args:
        recipe: recipe of the MoE.
        seed: seed of the run.
        output: folder of the run; existing stages and features take no time.
        machine: numbers of threads; torch is left with all of them.

    Returns:
        The remaining seconds by part.
    """
    marks = {
        "features": "moe/features.json",
        "pretraining": "moe/stages/pretrain-*/metrics.json",
        "stage 1": "moe/stages/align-*/metrics.json",
        "stages 2 and 3": "moe/stages/tune-*/metrics.json",
        "evaluation": "moe/evaluation.json",
    }
    done = {part: any(output.glob(mark)) for part, mark in marks.items()}
    if done["evaluation"]:
        return Forecast({})
    raw = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    stages = {stage["name"]: stage["steps"] for stage in raw["stages"]}
    media, asked = _count(raw, output)
    folder = output / "data" / "rehearsal"
    try:
        times = _rehearse(raw, folder, seed, machine, list(stages))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for path in (output / "rehearsal", output / "rehearsal.features"):
            shutil.rmtree(path, ignore_errors=True)
        (output / "rehearsal.yaml").unlink(missing_ok=True)
        torch.set_num_threads(machine.cores)
    seconds = {"features": sum(len(paths) * times.of(f"encode {k}") for k, paths in media.items())}
    if "pretrain" in stages:
        seconds["pretraining"] = stages["pretrain"] * times.of("pretrain")
    seconds["stage 1"] = stages["align"] * times.of("align")
    seconds["stages 2 and 3"] = sum(
        steps * times.of(name)
        for name, steps in stages.items()
        if name not in ("pretrain", "align")
    ) + len(media["speech"]) * times.of("connector speech")
    seconds["evaluation"] = asked * times.of("eval")
    return Forecast({name: value for name, value in seconds.items() if not done[name]})


def _count(raw: dict, output: Path) -> tuple[dict[str, set[str]], int]:
    """Numbers of media by kind, and of held-out questions."""
    media: dict[str, set[str]] = {kind: set() for kind in MEDIA_KINDS}
    asked = 0
    files = [*raw["data"].values(), *(own["data"] for own in raw["evaluate"].values())]
    for number, file in enumerate(files):
        for line in (output / file).read_text(encoding="utf-8").splitlines():
            asked += number >= len(raw["data"])
            found = json.loads(line)
            for kind in MEDIA_KINDS:
                media[kind].update([found[kind]] if isinstance(found.get(kind), str) else ())
    return media, asked


def _rehearse(raw: dict, folder: Path, seed: int, machine: Machine, stages: list[str]) -> _Times:
    output = folder.parents[1]
    folder.mkdir(parents=True, exist_ok=True)
    for key, file in raw["data"].items():
        raw["data"][key] = _few(output / file, folder / f"{key}.jsonl")
    task, own = next(iter(raw["evaluate"].items()))
    own["data"] = _few(output / own["data"], folder / "asked.jsonl", _ASKED)
    raw["evaluate"] = {task: own | {"max_new_tokens": _NEW_TOKENS}}
    for stage in raw["stages"]:
        stage["steps"] = _STEPS
    (output / "rehearsal.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    times = _Times()
    # Progress of short operations is not shown.
    with redirect_stderr(StringIO()):
        features = output / "rehearsal.features"
        _, run = open_run(output / "rehearsal.yaml", seed, features, times)
        torch.set_num_threads(machine.cores)
        run.encode()
        shared = stages[: stages.index("align") + 1]
        run.train(shared)
        torch.set_num_threads(max(1, machine.cores // _ARMS))
        run.train(stages)
        run.evaluate(stages[-1:])
    return times


def _few(source: Path, target: Path, most: int | None = None) -> str:
    """The first lines of a data file: two batches per encoder, or `most` lines."""
    seen: dict[str, set] = defaultdict(set)
    lines = []
    for line in source.read_text(encoding="utf-8").splitlines():
        found = json.loads(line)
        kinds = [kind for kind in MEDIA_KINDS if kind in found]
        enough = all(len(seen[kind]) >= 2 * BATCHES[kind] for kind in kinds)
        if len(lines) >= (most or 4) and (most or enough):
            break
        for kind in kinds:
            seen[kind].add(found[kind])
        lines.append(line)
    target.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(target.relative_to(target.parents[2]))


def _clock(seconds: float) -> str:
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"
