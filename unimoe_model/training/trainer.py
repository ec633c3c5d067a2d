"""Trains the given parameters of a model for one stage; a killed stage goes on where it was."""

import contextlib
import json
import math
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from unimoe_kernels import atomic_write
from unimoe_kernels.distributed import parameter_groups
from unimoe_model.data.collate import IGNORED
from unimoe_model.precision import multiplies_bf16
from unimoe_model.training.checkpoint import (
    Progress,
    discard_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from unimoe_model.training.muon import Muon
from unimoe_model.training.progress import ProgressReporter
from unimoe_model.training.ranks import Ranks


@dataclass(frozen=True)
class OptimizerSettings:
    """Length and optimiser of a stage: linear warm-up, then cosine decay to a tenth.

    Attributes:
        steps: optimiser steps.
        batch_size: examples a step.
        learning_rate: highest learning rate of AdamW.
        muon_learning_rate: highest learning rate of Muon, which then trains the matrices of the
            decoder layers; None leaves them to AdamW.
        warmup: share of the steps that warm up.
        weight_decay: of both.
        max_grad_norm: gradients are scaled down to this norm.
    """

    steps: int
    batch_size: int
    learning_rate: float
    muon_learning_rate: float | None = None
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self):
        for name in ("steps", "batch_size"):
            if int(getattr(self, name)) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        for name in ("learning_rate", "muon_learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if not (value is None or value > 0):
                raise ValueError(f"{name} ({value}) must be positive")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay ({self.weight_decay}) must be at least 0")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup ({self.warmup}) must be a share of the steps, 0 to 1")

    def learning_rate_factor(self, step: int) -> float:
        """Share of the highest learning rate that step `step`, counted from 0, uses."""
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))


def build_optimizers(
    parameters: dict[str, nn.Parameter], settings: OptimizerSettings
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the decoder layers' matrices and AdamW for the rest.

    Muon orthogonalises float32 parameters in bfloat16 where the device has instructions for it, and
    else in their own dtype.

    Args:
        parameters: what is trained, by name.
        settings: with a `muon_learning_rate`, Muon is used.

    Reference: AdamW, arXiv 1711.05101; Muon, arXiv 2502.16982.
    """
    use_muon = settings.muon_learning_rate is not None
    hidden = {n: p for n, p in parameters.items() if use_muon and ".layers." in n and p.dim() == 2}
    first = next(iter(parameters.values()))
    is_single = first.dtype == torch.float32
    others = [p for name, p in parameters.items() if name not in hidden]
    optimizers: list[torch.optim.Optimizer] = []
    if others:
        optimizers.append(
            torch.optim.AdamW(
                parameter_groups(others),
                lr=settings.learning_rate,
                betas=(0.9, 0.95),
                weight_decay=settings.weight_decay,
                fused=True,
            )
        )
    if hidden:
        optimizers.append(
            Muon(
                list(hidden.values()),
                lr=settings.muon_learning_rate,
                weight_decay=settings.weight_decay,
                dtype=torch.bfloat16
                if is_single and multiplies_bf16(first.device)
                else first.dtype,
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def autocast(device: torch.device, precision: str):
    """Context of the forward pass: bfloat16 autocast, or nothing for `"fp32"`.

    Raises:
        ValueError: If precision is neither `"bf16"` nor `"fp32"`.
    """
    if precision not in ("bf16", "fp32"):
        raise ValueError(f"precision ({precision!r}) must be 'bf16' or 'fp32'")
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def answer_loss(
    model: nn.Module, batch: dict[str, torch.Tensor], count: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean cross-entropy of the answer tokens; the head runs on their positions alone.

    The prompt is most of a batch, so this skips most of the largest matmul and its softmax.

    Args:
        model: has `hidden_states(**inputs)` and `lm_head`.
        batch: inputs and labels.
        count: what the sum is divided by instead of the number of answer tokens in the batch: that
            of all processes.
    """
    labels = batch["labels"][:, 1:]
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    hidden = model.hidden_states(**inputs)[:, :-1]
    wanted = labels != IGNORED
    logits = model.lm_head(hidden[wanted])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if count is None:
        return nn.functional.cross_entropy(logits, labels[wanted])
    return nn.functional.cross_entropy(logits, labels[wanted], reduction="sum") / count


def train_stage(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    batch_of: Callable[[int], dict[str, torch.Tensor]],
    settings: OptimizerSettings,
    folder: Path,
    run: str,
    stage: str,
    reporter: ProgressReporter,
    precision: str = "fp32",
    checkpoint_seconds: float = 20.0,
    ranks: Ranks | None = None,
) -> Progress:
    """Trains `parameters` and nothing else, from a checkpoint if there is one.

    Args:
        model: model with `hidden_states(**inputs)` and `lm_head`; changed in place.
        parameters: what is trained, by name; all else is frozen for the stage.
        batch_of: inputs and labels of a step, the same whenever it is asked; of this process's
            share.
        settings: length and optimiser.
        folder: where the checkpoint is kept while the stage runs.
        run: fingerprint of everything that decides the result.
        stage: shown with the progress.
        reporter: is told of the progress.
        precision: `"bf16"` (autocast) or `"fp32"`.
        checkpoint_seconds: time between checkpoints.
        ranks: the processes that train the model together; None is this one alone.

    Returns:
        Losses, tokens and seconds of the whole stage. The checkpoint stays until
        `finish_stage`.

    Raises:
        ValueError: If the checkpoint is of another run, or the loss is not finite.
    """
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    ranks = ranks or Ranks()
    parameters = ranks.divide(model, parameters)
    optimizers = build_optimizers(parameters, settings)
    checkpoint = folder / "checkpoint"
    kept = (checkpoint, run, parameters, optimizers)
    progress = load_checkpoint(*kept, ranks.is_alone) or Progress(losses=[])
    reporter.start(stage, settings.steps, progress.step)
    device = next(iter(parameters.values())).device
    model.train()
    resumed_at, started = progress.seconds, time.monotonic()
    saved = started
    for step in range(progress.step, settings.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * settings.learning_rate_factor(step)
        # Dropout of a step is the same, however often the stage was interrupted before it.
        torch.manual_seed(zlib.crc32(f"{run}/{step}".encode()))
        batch = {k: v.to(device) for k, v in batch_of(step).items()}
        count = ranks.count((batch["labels"][:, 1:] != IGNORED).sum())
        with autocast(device, precision):
            loss = answer_loss(model, batch, count)
        model.zero_grad(set_to_none=True)
        loss.backward()
        ranks.clip(parameters.values(), settings.max_grad_norm)
        # All processes save when the clock of the first one says so.
        due = ranks.is_first and time.monotonic() - saved > checkpoint_seconds
        value, tokens, due = ranks.sums(
            f"loss of {stage}, step {step}", loss.item(), int(batch["attention_mask"].sum()), due
        )
        if not math.isfinite(value):
            raise ValueError(f"loss of {stage}, step {step} ({value}) must be finite")
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
        if due and progress.step < settings.steps:
            save_checkpoint(checkpoint, run, progress, parameters, optimizers, ranks.is_alone)
            saved = time.monotonic()
    reporter.finish()
    ranks.unite(model, parameters)
    model.eval()
    return progress


def finish_stage(folder: Path, run: str, settings: OptimizerSettings, progress: Progress) -> None:
    """Writes the stage's `metrics.json`, its mark of completion, and drops the checkpoint."""
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
