"""The loss of a batch: cross entropy of the labelled tokens."""

import contextlib

import torch
from torch import nn

from unimoe_model.tokenization import IGNORED


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


def count_labels(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Number of tokens of a batch that the loss is taken of."""
    return (batch["labels"][:, 1:] != IGNORED).sum()


def count_tokens(batch: dict[str, torch.Tensor]) -> int:
    """Number of tokens of a batch, padding left out."""
    mask = batch["token_mask"] if "token_mask" in batch else batch["attention_mask"]
    return int(mask.sum())


def answer_loss(
    model: nn.Module, batch: dict[str, torch.Tensor], count: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean cross-entropy of the answer tokens; the head runs on their positions alone.

    The prompt is most of a batch, so this skips most of the largest matmul and its softmax.

    Args:
        model: has `hidden_states(**inputs)` and `lm_head`.
        batch: inputs and labels.
        count: what the sum is divided by instead of the number of answer tokens in the batch: that
            of all parts and processes.
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
