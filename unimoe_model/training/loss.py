"""Losses of the labelled tokens of a batch: cross entropy, and divergence from a teacher."""

import contextlib

import torch
from torch import nn

from unimoe_model.tokenization import IGNORED

_ROWS = 16
"""Number of rows of logits at a time."""


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
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    count: torch.Tensor | None = None,
    pad_to_multiple_of: int = 1,
) -> torch.Tensor:
    """Mean cross entropy of the labelled tokens.

    Args:
        model: model with `hidden_states(**inputs)` and `lm_head`.
        batch: inputs and labels.
        count: divisor of the summed loss: the labelled tokens of all parts and processes. None for
            those of this batch.
        pad_to_multiple_of: the number of rows of logits is padded to a multiple of it.

    Returns:
        Scalar, at least float32.
    """
    logits, labels = _labelled(model, batch, pad_to_multiple_of)
    if count is None:
        return nn.functional.cross_entropy(logits, labels)
    return nn.functional.cross_entropy(logits, labels, reduction="sum") / count


def distillation_loss(
    model: nn.Module,
    teacher: nn.Module,
    batch: dict[str, torch.Tensor],
    count: torch.Tensor | None = None,
    pad_to_multiple_of: int = 1,
) -> torch.Tensor:
    """Mean Kullback-Leibler divergence of the model's predictions from those of a teacher.

    At each labelled token it is the sum of `p (log p - log q)` over the vocabulary, with `p` of the
    teacher and `q` of the model, at temperature 1 (arXiv:1503.02531). It is 0, and so is its
    gradient, where the model predicts what the teacher does: training on it with answers of other
    data keeps what an LLM knows (arXiv:1606.09282) without the noise of a cross entropy.

    Args:
        model: model with `hidden_states(**inputs)` and `lm_head`.
        teacher: model with the same inputs and vocabulary; no gradient is computed for it.
        batch: inputs and labels.
        count: as of `answer_loss`.
        pad_to_multiple_of: as of `answer_loss`.

    Returns:
        Scalar, at least float32.
    """
    logits, labels = _labelled(model, batch, pad_to_multiple_of)
    with torch.no_grad():
        expected, _ = _labelled(teacher, batch, pad_to_multiple_of)
    held = (labels != IGNORED).sum()
    return _Divergence.apply(logits, expected, int(held)) / (held if count is None else count)


class _Divergence(torch.autograd.Function):
    """Sum of the divergences of the first `held` rows of logits from those expected.

    The gradient is computed in the forward, some rows at a time, so that intermediate results stay
    in the cache of a CPU: with a large vocabulary they take most of the time otherwise.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, expected: torch.Tensor, held: int) -> torch.Tensor:
        total = logits.new_zeros(())
        gradient = torch.empty_like(logits)
        gradient[held:] = 0
        chunks = (tensor[:held].split(_ROWS) for tensor in (logits, expected, gradient))
        for own, wanted, out in zip(*chunks, strict=True):
            q, p = own.log_softmax(-1), wanted.log_softmax(-1)
            share = p.exp()
            total += share.mul(p.sub_(q)).sum()
            torch.sub(q.exp_(), share, out=out)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, gradient_of_total: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradient_of_total, None, None


def _labelled(
    model: nn.Module, batch: dict[str, torch.Tensor], pad_to_multiple_of: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[N, V]`, at least float32, and labels `[N]` of the labelled tokens.

    Most tokens of a batch belong to prompts, so computing logits at no others saves most of the
    largest matmul and softmax. Rows that pad N to a multiple come last, with the label -100.
    """
    labels = batch["labels"][:, 1:]
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    hidden = model.hidden_states(**inputs)[:, :-1]
    wanted = labels != IGNORED
    hidden, labels = hidden[wanted], labels[wanted]
    if more := -len(labels) % pad_to_multiple_of:
        hidden = nn.functional.pad(hidden, (0, 0, 0, more))
        labels = nn.functional.pad(labels, (0, more), value=IGNORED)
    logits = model.lm_head(hidden)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), labels
