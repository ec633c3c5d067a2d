"""The loss of next-token prediction."""

import torch
from torch import nn


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross entropy of the next token, equal to `ForCausalLMLoss` of transformers.

    Args:
        logits: `[B, S, V]`.
        labels: `[B, S]` int64, -100 at positions without loss; shifted by one position here.
        num_items_in_batch: divisor of the summed loss; None for the mean.
        shift_labels: `[B, S]` int64, already shifted, instead of `labels`.

    Returns:
        Scalar, float64 for float64 logits and float32 otherwise.

    Raises:
        ValueError: If labels do not have the shape of the logits.
    """
    name = "labels" if shift_labels is None else "shift_labels"
    given = labels if shift_labels is None else shift_labels
    if given.shape != logits.shape[:-1]:
        raise ValueError(
            f"{name} (shape {list(given.shape)}) must have the shape of the logits that"
            f" logits_to_keep keeps ({list(logits.shape[:-1])})"
        )
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    if logits.dtype != torch.float64:
        logits = logits.float()
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = nn.functional.cross_entropy(
        logits.flatten(0, -2), shift_labels.flatten().to(logits.device), reduction=reduction
    )
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch
