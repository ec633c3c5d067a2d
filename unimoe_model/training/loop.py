"""The training loop of a stage, which resumes from its last checkpoint."""

import json
import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from unimoe_kernels import atomic_write
from unimoe_model.training.checkpoint import (
    Progress,
    discard_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from unimoe_model.training.frozen_weights import frozen_weights
from unimoe_model.training.gradients import Batch, Objective, add_gradients
from unimoe_model.training.optimization import Optimization, build_optimizers, set_learning_rates
from unimoe_model.training.prefetch import prefetched
from unimoe_model.training.progress import ProgressReporter
from unimoe_model.training.ranks import Ranks
from unimoe_model.training.stopping import StoppedError, StopRequest


def train_stage(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    batch_of: Callable[[int], Batch | Sequence[Batch]],
    settings: Optimization,
    folder: Path,
    run: str,
    stage: str,
    reporter: ProgressReporter,
    objective: Objective | None = None,
    *,
    checkpoint_seconds: float = 20.0,
    ranks: Ranks | None = None,
    workers: int = 0,
) -> Progress:
    """Trains `parameters` and no others, resuming from a checkpoint if there is one.

    The first SIGINT or SIGTERM ends the stage after the current step and a checkpoint.

    Args:
        model: model with `hidden_states(**inputs)` and `lm_head`; changed in place.
        parameters: trained parameters by name; all others are frozen.
        batch_of: returns the inputs and labels of this process for a step, as a pure function of
            the step. For a list of parts, gradients are accumulated; all processes must return the
            same number of parts.
        settings: length and optimiser of the stage.
        folder: folder of the checkpoint while the stage runs.
        run: fingerprint of everything that determines the result.
        stage: name shown with the progress.
        reporter: shows progress.
        objective: loss and precision; None for that of answers in fp32.
        checkpoint_seconds: seconds between checkpoints.
        ranks: processes that train together; None for a single process.
        workers: number of threads that prepare batches.

    Returns:
        Losses, tokens and seconds of the whole stage. The checkpoint remains until `finish_stage`,
        and weights stay distributed over processes until `Ranks.unite`.

    Raises:
        ValueError: If the checkpoint is of another run, the loss is not finite, or a batch has no
            labels.
        OSError: If there is not enough disk space for a checkpoint.
        StoppedError: If a signal ended the stage.
    """
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    objective, ranks = objective or Objective(), ranks or Ranks()
    parameters = ranks.divide(model, parameters)
    optimizers = build_optimizers(parameters, settings)
    checkpoint = folder / "checkpoint"
    kept = (parameters, optimizers)
    progress = load_checkpoint(checkpoint, run, *kept) or Progress(losses=[])
    reporter.start(stage, settings.steps, progress.step)
    model.train()
    resumed_at, started = progress.seconds, time.monotonic()
    saved = started
    steps = range(progress.step, settings.steps)
    batches = prefetched(batch_of, steps.start, steps.stop, workers)
    # Distributed weights must keep their dtype.
    converts = objective.precision == "bf16" and ranks.is_single
    frozen = frozen_weights(model, torch.bfloat16) if converts else nullcontext()
    with StopRequest() as stop, recomputed(model, settings.gradient_checkpointing), frozen:
        for step, batch in zip(steps, batches, strict=True):
            set_learning_rates(optimizers, settings, step)
            # Makes dropout of a step independent of earlier interruptions, and that of the samples
            # of a process of that of others.
            drawn = f"{run}/{step}" + ("" if ranks.is_first else f"/{ranks.rank}")
            torch.manual_seed(zlib.crc32(drawn.encode()))
            place = f"{stage}, step {step}"
            # Not of the model: walking through all of its frozen parameters takes longer.
            for parameter in parameters.values():
                parameter.grad = None
            loss, tokens = add_gradients(model, batch, objective, ranks, place)
            ranks.clip(parameters.values(), settings.max_grad_norm)
            # The clock of the first process decides when all of them save; they stop together.
            due = ranks.is_first and time.monotonic() - saved > checkpoint_seconds
            value, tokens, due, signal = ranks.sums(
                f"loss of {place}", loss, tokens, due, stop.signal
            )
            if not math.isfinite(value):
                raise ValueError(f"loss of {place} ({value}) must be finite")
            for optimizer in optimizers:
                optimizer.step()
            progress.step = step + 1
            progress.losses.append(value)
            progress.tokens += int(tokens)
            now = time.monotonic()
            progress.seconds = resumed_at + now - started
            reporter.advance(
                1, loss=f"{value:.3f}", tokens_per_s=f"{progress.tokens / progress.seconds:.0f}"
            )
            if (due or signal) and progress.step < settings.steps:
                save_checkpoint(checkpoint, run, progress, *kept)
                saved = time.monotonic()
            if signal:
                reporter.finish()
                raise StoppedError(
                    f"stopped after step {progress.step} of {stage}", stop.signal or int(signal)
                )
    reporter.finish()
    model.eval()
    return progress


@contextmanager
def recomputed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Enables gradient checkpointing in the block if `wanted`."""
    if not wanted:
        yield
        return
    # Named activation checkpointing in transformers 5.24 and later.
    known = hasattr(model, "activation_checkpointing_enable")
    name = "activation_checkpointing" if known else "gradient_checkpointing"
    getattr(model, f"{name}_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{name}_disable")()


def finish_stage(folder: Path, run: str, settings: Optimization, progress: Progress) -> None:
    """Writes `metrics.json`, which marks the stage as complete, and removes the checkpoint."""
    metrics = {
        "run": run,
        "settings": asdict(settings),
        "seconds": progress.seconds,
        "tokens": progress.tokens,
        "losses": progress.losses,
    }
    with atomic_write(folder / "metrics.json") as partial:
        partial.write_text(json.dumps(metrics), encoding="utf-8")
    discard_checkpoint(folder / "checkpoint")
