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

from unimoe_kernels import MoE, atomic_write
from unimoe_model.training.batches import DISTILLED
from unimoe_model.training.checkpoint import (
    Progress,
    discard_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from unimoe_model.training.frozen_weights import frozen_weights
from unimoe_model.training.loss import (
    answer_loss,
    autocast,
    count_labels,
    count_tokens,
    distillation_loss,
)
from unimoe_model.training.optimization import Optimization, build_optimizers, set_learning_rates
from unimoe_model.training.prefetch import prefetched
from unimoe_model.training.progress import ProgressReporter
from unimoe_model.training.ranks import Ranks
from unimoe_model.training.stopping import StoppedError, StopRequest
from unimoe_model.training.word_loss import word_loss

Batch = dict[str, torch.Tensor]
LOSSES = {"answers": answer_loss, "words": word_loss}
"""Loss of a batch by the objective of its stage."""


def train_stage(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    batch_of: Callable[[int], Batch | Sequence[Batch]],
    settings: Optimization,
    folder: Path,
    run: str,
    stage: str,
    reporter: ProgressReporter,
    precision: str = "fp32",
    checkpoint_seconds: float = 20.0,
    ranks: Ranks | None = None,
    workers: int = 0,
    objective: str = "answers",
    teacher: nn.Module | None = None,
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
        precision: `"bf16"` (autocast) or `"fp32"`.
        checkpoint_seconds: seconds between checkpoints.
        ranks: processes that train together; None for a single process.
        workers: number of threads that prepare batches.
        objective: key of `LOSSES`.
        teacher: model that parts with the key `DISTILLED` are distilled from; None if there are
            none.

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
    ranks = ranks or Ranks()
    parameters = ranks.divide(model, parameters)
    optimizers = build_optimizers(parameters, settings)
    checkpoint = folder / "checkpoint"
    kept = (parameters, optimizers)
    progress = load_checkpoint(checkpoint, run, *kept) or Progress(losses=[])
    reporter.start(stage, settings.steps, progress.step)
    device = next(iter(parameters.values())).device
    model.train()
    resumed_at, started = progress.seconds, time.monotonic()
    saved = started
    steps = range(progress.step, settings.steps)
    batches = prefetched(batch_of, steps.start, steps.stop, workers)
    # Distributed weights must keep their dtype.
    converts = precision == "bf16" and ranks.is_single
    frozen = frozen_weights(model, torch.bfloat16) if converts else nullcontext()
    with StopRequest() as stop, recomputed(model, settings.gradient_checkpointing), frozen:
        for step, batch in zip(steps, batches, strict=True):
            set_learning_rates(optimizers, settings, step)
            # Makes dropout of a step independent of earlier interruptions.
            torch.manual_seed(zlib.crc32(f"{run}/{step}".encode()))
            place = f"{stage}, step {step}"
            # Not of the model: walking through all of its frozen parameters takes longer.
            for parameter in parameters.values():
                parameter.grad = None
            loss, tokens = add_gradients(
                model, batch, ranks, device, precision, place, objective, teacher
            )
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


def add_gradients(
    model: nn.Module,
    batch: Batch | Sequence[Batch],
    ranks: Ranks,
    device: torch.device,
    precision: str,
    place: str,
    objective: str = "answers",
    teacher: nn.Module | None = None,
) -> tuple[float, int]:
    """Runs forward and backward of this process's share of a batch; returns its loss and tokens."""
    parts = [batch] if isinstance(batch, dict) else list(batch)
    labels = sum(count_labels(part) for part in parts)
    # With one process and one part, the mean over the part is the mean over the batch.
    count = ranks.count(labels)
    if count is None and len(parts) > 1:
        count = labels
    if not (labels if count is None else count):
        raise ValueError(f"batch of {place} must have a labelled token; it has none")
    loss, tokens = 0.0, 0
    with _aux_losses_of(model, len(parts)):
        for part in parts:
            inputs = {key: value.to(device) for key, value in part.items() if key != DISTILLED}
            with autocast(device, precision):
                total = None if count is None else count.to(device)
                if DISTILLED in part:
                    weight = part[DISTILLED].item()
                    value = weight * distillation_loss(model, teacher, inputs, total)
                else:
                    value = LOSSES[objective](model, inputs, total)
            if not value.requires_grad:
                # The part uses no trained parameter, but all processes must run a backward.
                value = value + 0 * next(p for p in model.parameters() if p.requires_grad).sum()
            value.backward()
            loss += value.item()
            tokens += count_tokens(part)
    return loss, tokens


@contextmanager
def _aux_losses_of(model: nn.Module, parts: int) -> Iterator[None]:
    """Scales router losses, which each part injects in full, to their mean over the parts."""
    layers = [module for module in model.modules() if isinstance(module, MoE)] if parts > 1 else []
    for layer in layers:
        layer.aux_loss_scale /= parts
    try:
        yield
    finally:
        for layer in layers:
            layer.aux_loss_scale *= parts


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
