"""The gradients of a step: the loss of each part of a batch, and its backward."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from unimoe_kernels import MoE
from unimoe_model.training.batches import DISTILLED
from unimoe_model.training.image_dropout import drop_image_channels
from unimoe_model.training.loss import (
    answer_loss,
    autocast,
    count_labels,
    count_tokens,
    distillation_loss,
)
from unimoe_model.training.ranks import Ranks
from unimoe_model.training.recipe.stage import OBJECTIVES
from unimoe_model.training.word_loss import Vocabulary, word_loss

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """What a stage minimises, and in which precision.

    Attributes:
        name: `"answers"` (`answer_loss`) or `"words"` (`word_loss`).
        precision: `"bf16"` (autocast) or `"fp32"`.
        teacher: model that parts with the key `DISTILLED` are distilled from; None if there are
            none.
        pad_to_multiple_of: the number of rows of logits is padded to a multiple of it.
        image_dropout: see `drop_image_channels`.
        vocabulary: that of the model, for `"words"`; None to build it for each part.

    Raises:
        ValueError: If `name` is not one of `OBJECTIVES`.
    """

    name: str = "answers"
    precision: str = "fp32"
    teacher: nn.Module | None = None
    pad_to_multiple_of: int = 1
    image_dropout: float = 0.0
    vocabulary: Vocabulary | None = None

    def __post_init__(self):
        if self.name not in OBJECTIVES:
            raise ValueError(f"name ({self.name!r}) must be one of {', '.join(OBJECTIVES)}")

    def loss(self, model: nn.Module, part: Batch, count: torch.Tensor | None) -> torch.Tensor:
        """Loss of a part, whose sum over labelled tokens is divided by `count`; None: their mean.

        Args:
            model: see `answer_loss`.
            part: inputs and labels; with the key `DISTILLED`, the divergence from the teacher times
                that weight is the loss.
            count: see `answer_loss`.
        """
        device = next(model.parameters()).device
        inputs = {key: value.to(device) for key, value in part.items() if key != DISTILLED}
        inputs = drop_image_channels(inputs, self.image_dropout)
        count = None if count is None else count.to(device)
        with autocast(device, self.precision):
            if DISTILLED in part:
                given = (self.teacher, inputs, count, self.pad_to_multiple_of)
                return part[DISTILLED].item() * distillation_loss(model, *given)
            if self.name == "words":
                return word_loss(model, inputs, count, self.vocabulary)
            return answer_loss(model, inputs, count, self.pad_to_multiple_of)


def add_gradients(
    model: nn.Module,
    batch: Batch | Sequence[Batch],
    objective: Objective,
    ranks: Ranks,
    place: str,
) -> tuple[float, int]:
    """Runs forward and backward of this process's share of a batch; returns its loss and tokens.

    The loss is the mean over the labelled tokens of all parts that are learned, plus the weighted
    mean over those of all parts that are distilled.

    Args:
        model: model whose trained parameters require gradients, which are added to.
        batch: inputs and labels, or a list of parts.
        objective: the loss.
        ranks: processes that train together.
        place: stage and step, for error messages.

    Raises:
        ValueError: If the batch has no labelled token.
    """
    parts = [batch] if isinstance(batch, dict) else list(batch)
    distilled = [DISTILLED in part for part in parts]
    counts = {
        kind: _count([p for p, own in zip(parts, distilled, strict=True) if own == kind], ranks)
        for kind in sorted(set(distilled))
    }
    if not any(counts.values()):
        raise ValueError(f"batch of {place} must have a labelled token; it has none")
    # With one process and one part, the mean over the part is the mean over the batch.
    is_whole = ranks.is_single and len(parts) == 1
    loss, tokens = 0.0, 0
    with _aux_losses_of(model, len(parts)):
        for part in parts:
            count = None if is_whole else counts[DISTILLED in part].clamp(min=1)
            value = objective.loss(model, part, count)
            if not value.requires_grad:
                # The part uses no trained parameter, but all processes must run a backward.
                value = value + 0 * next(p for p in model.parameters() if p.requires_grad).sum()
            value.backward()
            loss += value.item()
            tokens += count_tokens(part)
    return loss, tokens


def _count(parts: Sequence[Batch], ranks: Ranks) -> torch.Tensor:
    """Labelled tokens of parts, over all processes."""
    labels = sum(count_labels(part) for part in parts)
    total = ranks.count(labels)
    return labels if total is None else total


@contextmanager
def _aux_losses_of(model: nn.Module, parts: int) -> Iterator[None]:
    """Scales router losses, which each part injects in full, to their mean over the parts.

    Losses of modalities are sums over samples, and remain as they are.
    """
    modules = list(model.modules()) if parts > 1 else []
    layers = [module for module in modules if isinstance(module, MoE)]
    summed = [module for module in modules if hasattr(module, "modality_loss_scale")]
    for layer in layers:
        layer.aux_loss_scale /= parts
    for layer in summed:
        layer.modality_loss_scale *= parts
    try:
        yield
    finally:
        for layer in layers:
            layer.aux_loss_scale *= parts
        for layer in summed:
            layer.modality_loss_scale /= parts
