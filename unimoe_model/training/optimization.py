"""Length, learning rate and optimisers of a stage."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from unimoe_kernels.distributed import parameter_groups
from unimoe_model.checkpoints.names import DECODER_LAYERS
from unimoe_model.precision import multiplies_bf16
from unimoe_model.training.muon import Muon

SCHEDULES = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}
"""Learning rate relative to its peak, as a function of the share of the decay that is done."""


@dataclass(frozen=True)
class Optimization:
    """Length and optimiser of a stage, with linear warm-up and decay of the learning rate.

    Attributes:
        steps: number of optimiser steps.
        batch_size: samples per step.
        learning_rate: peak learning rate of AdamW.
        muon_learning_rate: peak learning rate of Muon, which then trains the matrices of the
            decoder layers; None to use AdamW for all parameters.
        schedule: decay after the warm-up: `"cosine"`, `"linear"` or `"constant"`.
        final_rate: final learning rate as a share of the peak.
        warmup: share of the steps used for the warm-up.
        weight_decay: weight decay of both optimisers.
        max_grad_norm: maximum norm of the gradients, which are scaled down to it.
        accumulation: number of parts of a batch whose gradients are accumulated.
        gradient_checkpointing: whether to recompute the activations of decoder layers in the
            backward pass.

    Raises:
        ValueError: If a value is out of range.
    """

    steps: int
    batch_size: int
    learning_rate: float
    muon_learning_rate: float | None = None
    schedule: str = "cosine"
    final_rate: float = 0.1
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    accumulation: int = 1
    gradient_checkpointing: bool = False

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulation"):
            if int(getattr(self, name)) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        for name in ("learning_rate", "muon_learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if not (value is None or 0 < value < math.inf):
                raise ValueError(f"{name} ({value}) must be positive")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay ({self.weight_decay}) must be at least 0")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup ({self.warmup}) must be a share of the steps, 0 to 1")
        if not 0 <= self.final_rate <= 1:
            raise ValueError(f"final_rate ({self.final_rate}) must be a share, 0 to 1")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule ({self.schedule!r}) must be one of {', '.join(SCHEDULES)}")
        if self.accumulation > self.batch_size:
            raise ValueError(
                f"accumulation ({self.accumulation}) must be at most batch_size ({self.batch_size})"
            )

    def learning_rate_factor(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0, as a share of the peak."""
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        return self.final_rate + (1 - self.final_rate) * SCHEDULES[self.schedule](done)


def build_optimizers(
    parameters: dict[str, nn.Parameter], settings: Optimization
) -> list[torch.optim.Optimizer]:
    """Builds AdamW for all parameters, or Muon for matrices of decoder layers and AdamW for others.

    Muon orthogonalises float32 parameters in bfloat16 if the device has instructions for it, and
    in their own dtype otherwise.

    Args:
        parameters: trained parameters by name.
        settings: settings of the stage; Muon is used if `muon_learning_rate` is set.

    Returns:
        One or two optimisers.

    Reference: AdamW, arXiv 1711.05101; Muon, arXiv 2502.16982.
    """
    use_muon = settings.muon_learning_rate is not None
    hidden = {
        name: own
        for name, own in parameters.items()
        if use_muon and name.startswith(DECODER_LAYERS) and own.dim() == 2
    }
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


def set_learning_rates(
    optimizers: list[torch.optim.Optimizer], settings: Optimization, step: int
) -> None:
    """Sets the learning rate of every parameter group for a step."""
    factor = settings.learning_rate_factor(step)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
