"""Cross entropy of the labelled tokens of a batch."""

import contextlib

import torch
from torch import nn

from unimoe_model.tokenization import IGNORED


def autocast(device: torch.device, precision: str):
    """Context of the forward pass: bfloat16 autocast for `"bf16"`, no effect for `"fp32"`.

    Raises:
        ValueError: If `precision` is neither `"bf16"` nor `"fp32"`.
    """
    if precision not in ("bf16", "fp32"):
        raise ValueError(f"precision ({precision!r}) must be 'bf16' or 'fp32'")
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def count_labels(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Number of labelled tokens of a batch, an int64 scalar tensor."""
    return (batch["labels"][:, 1:] != IGNORED).sum()


def count_tokens(batch: dict[str, torch.Tensor]) -> int:
    """Number of tokens of a batch, without padding."""
    mask = batch["token_mask"] if "token_mask" in batch else batch["attention_mask"]
    return int(mask.sum())


def answer_loss(
    model: nn.Module, batch: dict[str, torch.Tensor], count: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean cross entropy of the labelled tokens, computing logits at their positions only.

    Most tokens of a batch belong to prompts, so this saves most of the largest matmul and softmax.

    Args:
        model: model with `hidden_states(**inputs)` and `lm_head`.
        batch: inputs and labels.
        count: divisor of the summed loss: the labelled tokens of all parts and processes. None for
            those of this batch.

    Returns:
        Scalar, at least float32.
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
