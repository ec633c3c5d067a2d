"""The parts of a run that processes of their own train, and what they send to the terminal's."""

import json
import os
import threading
import time
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from unimoe_model.evaluation.files import write_whole
from unimoe_model.training.arm import build_trainer, train_arm
from unimoe_model.training.forecast import forecast
from unimoe_model.training.progress import ProgressReporter, QueueReporter
from unimoe_model.training.run_data import build_tasks, held_out_examples
from unimoe_model.training.settings import RunSettings
from unimoe_model.training.stages import ARMS
from unimoe_model.user_errors import USER_ERRORS

FEATURES_SECONDS, FORECAST = "features.json", "forecast.json"


def train_base(
    settings: RunSettings,
    output: Path,
    cache_folder: Path,
    reporter: ProgressReporter,
    device: torch.device,
) -> None:
    """Encodes all media and trains what both arms share, so that they find it done.

    Without a `language_model` they share nothing but the features. How long the run will take is
    measured and told first, and kept in `forecast.json`.

    Args:
        settings: what to train.
        output: see `train_arm`.
        cache_folder: where the encoders' features are kept.
        reporter: is told of the progress.
        device: where to train.
    """
    expected = forecast(settings, output, cache_folder, device, torch.get_num_threads())
    if expected.seconds:
        reporter.say(f"This will take {expected}")
    # A run that goes on keeps what was expected of the whole.
    if not (output / FORECAST).exists():
        write_whole(output / FORECAST, json.dumps(expected.seconds))
    started = time.monotonic()
    builder = build_tasks(settings, cache_folder, device)
    tasks = builder.media_examples("train") | builder.text_examples()
    held_out_examples(settings, builder)
    _keep_seconds(output / "base" / FEATURES_SECONDS, time.monotonic() - started)
    if settings.language_model is not None:
        trainer = build_trainer(settings, ARMS[0], output, tasks, builder.bank, reporter, device)
        trainer.query_states(trainer.align())


def _keep_seconds(path: Path, seconds: float) -> None:
    """Writes a time, unless one is there: features that are found again take none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"seconds": seconds}))


def run_part(
    settings: RunSettings,
    part: str,
    output: Path,
    cache_folder: Path,
    queue,
    device: torch.device,
    threads: int,
) -> None:
    """Body of a process that trains one part of a run and sends progress and errors to `queue`.

    Args:
        settings: what to train.
        part: an arm, or `"base"` for what all arms share.
        output: see `train_arm`.
        cache_folder: where the encoders' features are kept.
        queue: takes the messages that `replay` reads, and `"done"` or `"failed"` at the end.
        device: where to train.
        threads: of torch.
    """
    torch.set_num_threads(threads)
    disable_progress_bar()
    _exit_with_parent()
    reporter = QueueReporter(part, queue)
    try:
        if part == "base":
            train_base(settings, output, cache_folder, reporter, device)
        else:
            train_arm(settings, part, output, cache_folder, reporter, device)
    except KeyboardInterrupt:
        return
    except USER_ERRORS as error:
        queue.put((part, "failed", (str(error),), {}))
        return
    except Exception as error:
        queue.put((part, "failed", (f"{type(error).__name__}: {error}",), {}))
        raise
    queue.put((part, "done", (), {}))


def _exit_with_parent() -> None:
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
