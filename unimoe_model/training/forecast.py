"""How long a run will take on this machine, from a rehearsal with few items and few steps."""

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from unimoe_model.data.collate import Collator
from unimoe_model.data.examples import Example, MediaBank
from unimoe_model.data.feature_cache import FeatureCache
from unimoe_model.data.limits import DataLimits
from unimoe_model.data.tasks import TaskBuilder, media_counts, text_examples
from unimoe_model.evaluation.accuracy import generate_answers
from unimoe_model.training.arm import build_trainer
from unimoe_model.training.progress import SilentReporter
from unimoe_model.training.run_data import build_encoders, held_out_counts
from unimoe_model.training.settings import RunSettings, StageSettings
from unimoe_model.training.stages import ARMS

_FEW, _MORE = 4, 20
"""Items of each media set: two numbers, because starting up is no time of an item."""
_STEPS = 4
_ANSWERED, _NEW_TOKENS = 128, 3
"""Questions of a batch, and tokens of most answers: a model that has learnt nothing goes on."""


class _TimedCache(FeatureCache):
    """Keeps how long each set took."""

    def __init__(self, root: Path):
        super().__init__(root)
        self.seconds: dict[str, float] = {}

    def load_or_build(self, name, fingerprint, build):
        started = time.monotonic()
        result = super().load_or_build(name, fingerprint, build)
        self.seconds[name] = time.monotonic() - started
        return result


class _StepTimes(SilentReporter):
    """Keeps how long each step of each stage took; the first of a stage warms up."""

    def __init__(self):
        self._stage = ""
        self._last = 0.0
        self._steps: dict[str, list[float]] = {}

    def start(self, stage: str, total: int, done: int) -> None:
        """A stage begins."""
        self._stage, self._last = stage, time.monotonic()
        self._steps[stage] = []

    def advance(self, steps: int, **figures: str) -> None:
        """Takes the time."""
        now = time.monotonic()
        self._steps[self._stage].append(now - self._last)
        self._last = now

    def of(self, stage: str) -> float:
        """Seconds of a step."""
        return statistics.median(self._steps[stage][1:])


@dataclass(frozen=True)
class Forecast:
    """Seconds that the parts of a run still need.

    Attributes:
        seconds: by part, in the order in which they run; parts that are done are left out.
    """

    seconds: dict[str, float]

    @property
    def total(self) -> float:
        """Seconds of the whole."""
        return sum(self.seconds.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_clock(value)}" for name, value in self.seconds.items())
        return f"about {_clock(self.total)} in all: {parts}"


def forecast(
    settings: RunSettings,
    output: Path,
    cache_folder: Path,
    device: torch.device,
    threads: int,
) -> Forecast:
    """Rehearses a run with few items and few steps, and scales what that took.

    Encoders, stages and generation are the real ones. The MoE arm is rehearsed alone on its share
    of the threads; in the run the dense arm, which is faster, runs beside it.

    Args:
        settings: what is trained.
        output: folder of the run; stages and features that are there need no time.
        cache_folder: where the encoders' features are kept.
        device: where it is trained.
        threads: of torch; the arms get half of them each. It is what torch has afterwards.

    Returns:
        What is left to do.
    """
    counts = media_counts(settings.data)
    missing = {
        name: count
        for name, count in counts.items()
        if not any(cache_folder.glob(f"{name}-*.safetensors"))
    }
    done = {
        "features": not missing,
        "pretraining": all(_is_done(output / arm / "pretrain") for arm in ARMS),
        "stage 1": all(_is_done(output / folder / "align") for folder in _aligned(settings)),
        "stages 2 and 3": all(_is_done(output / arm / "tune") for arm in ARMS),
        "evaluation": all((output / arm / "evaluation.json").exists() for arm in ARMS),
    }
    if done["features"] and done["evaluation"]:
        return Forecast({})
    with TemporaryDirectory() as folder:
        rehearsal = Path(folder)
        tasks, bank, per_item = _encode_few(settings, rehearsal, device)
        seconds = {
            "features": sum(n * per_item[name.rpartition("-")[0]] for name, n in missing.items())
        }
        seconds |= _rehearse_stages(settings, rehearsal, tasks, bank, device, threads, counts)
        torch.set_num_threads(threads)
    return Forecast({name: value for name, value in seconds.items() if not done[name]})


def _aligned(settings: RunSettings) -> tuple[str, ...]:
    """Folders of stage 1: one for all arms where they start from one language model."""
    return ARMS if settings.language_model is None else ("base",)


def _encode_few(settings: RunSettings, folder: Path, device: torch.device):
    """Encodes a few items of each training set; returns tasks, bank and seconds an item by set."""
    encoders = build_encoders(settings, device)
    caches = [_TimedCache(folder / str(n)) for n in (_FEW, _MORE)]
    for cache, most in zip(caches, (_FEW, _MORE), strict=True):
        limits = DataLimits(most, most, most, most, most)
        frames = settings.model.speech_max_frames
        builder = TaskBuilder(cache, encoders, frames, settings.seed, limits)
        # Bars of a moment are noise.
        with redirect_stderr(StringIO()):
            tasks = builder.media_examples("train")
    few, more = (cache.seconds for cache in caches)
    per_item = {
        name.rpartition("-")[0]: max((more[name] - few[name]) / (_MORE - _FEW), 0) for name in more
    }
    return tasks | text_examples(settings.seed), builder.bank, per_item


def _rehearse_stages(
    settings: RunSettings,
    folder: Path,
    tasks: Mapping[str, Sequence[Example]],
    bank: MediaBank,
    device: torch.device,
    threads: int,
    counts: Mapping[str, int],
) -> dict[str, float]:
    times = _StepTimes()
    short = _shortened(settings)
    trainer = build_trainer(short, ARMS[0], folder, tasks, bank, times, device)
    arm_threads = max(1, threads // len(ARMS))
    shared = settings.language_model is not None
    torch.set_num_threads(threads if shared else arm_threads)
    model = trainer.align()
    started = time.monotonic()
    trainer.query_states(model)
    heard = sum(len(bank.sets[source]) for source in bank.sets if bank.kinds[source] == "speech")
    per_clip = (time.monotonic() - started) / heard
    clips = sum(count for name, count in counts.items() if name.startswith("spoken"))
    seconds = {"stage 1": settings.align.optimizer.steps * times.of("align") + clips * per_clip}
    if settings.pretrain is not None:
        steps = settings.pretrain.optimizer.steps
        seconds = {"pretraining": steps * times.of("pretrain")} | seconds
    torch.set_num_threads(arm_threads)
    model = trainer.run()
    seconds["stages 2 and 3"] = settings.tune.optimizer.steps * times.of("tune") + sum(
        stage.optimizer.steps * times.of(f"experts/{kind}")
        for kind, stage in settings.experts.items()
    )
    questions = (list(tasks["image_qa"]) * _ANSWERED)[:_ANSWERED]
    collator = Collator(trainer.tokenizer, model.config, bank)
    started = time.monotonic()
    generate_answers(model, trainer.tokenizer, collator, questions, max_new_tokens=_NEW_TOKENS)
    per_answer = (time.monotonic() - started) / _ANSWERED
    seconds["evaluation"] = per_answer * sum(held_out_counts(settings).values())
    return seconds


def _shortened(settings: RunSettings) -> RunSettings:
    def short(stage: StageSettings) -> StageSettings:
        return replace(stage, optimizer=replace(stage.optimizer, steps=_STEPS))

    return replace(
        settings,
        pretrain=settings.pretrain and short(settings.pretrain),
        align=short(settings.align),
        experts={kind: short(stage) for kind, stage in settings.experts.items()},
        tune=short(settings.tune),
    )


def _is_done(stage: Path) -> bool:
    return (stage / "metrics.json").exists()


def _clock(seconds: float) -> str:
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"
