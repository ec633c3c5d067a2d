"""Connector outputs as weighted means of the LLM's embeddings."""

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_ROWS = 8192
"""Embeddings at a time, so that their directions are not all stored."""
_OUTPUTS = 1024
"""Outputs at a time: the weights of more are computed again in the backward instead of stored."""


def vocabulary_mixture(
    outputs: torch.Tensor, table: torch.Tensor, sharpness: float
) -> torch.Tensor:
    """Replaces each output of a connector by a weighted mean of the LLM's embeddings.

    The weights are a softmax over the vocabulary of `sharpness` times the cosine similarity between
    the output and each embedding, both relative to the mean embedding, as in the objective `words`.
    For media unlike those that it was trained on, a connector outputs vectors that are far from all
    embeddings, which the LLM reads badly. The mixture is near the most similar ones.

    Args:
        outputs: `[..., D]`.
        table: embeddings, `[V, D]`.
        sharpness: positive; the larger, the nearer a mixture is to the most similar embedding.

    Returns:
        `[..., D]`, in the dtype of `outputs`.

    Reference: arXiv:2502.01341 (AlignVLM), which learns the logits by two linear layers.
    """
    rows = outputs.reshape(-1, outputs.shape[-1])
    mean = table.mean(0, dtype=torch.promote_types(table.dtype, torch.float32))
    if len(rows) <= _OUTPUTS:
        return _mixture(rows, table, mean, sharpness).view(outputs.shape)
    parts = [
        checkpoint(
            _mixture, part, table, mean, sharpness, use_reentrant=False, preserve_rng_state=False
        )
        for part in rows.split(_OUTPUTS)
    ]
    return torch.cat(parts).view(outputs.shape)


def _mixture(
    outputs: torch.Tensor, table: torch.Tensor, mean: torch.Tensor, sharpness: float
) -> torch.Tensor:
    """Mixtures `[N, D]` of outputs `[N, D]`, whose weights `[N, V]` are in the dtype of `mean`."""
    directions = F.normalize(outputs.to(mean.dtype) - mean, dim=-1)
    cosines = [
        directions @ F.normalize(part.to(mean.dtype) - mean, dim=-1, eps=1e-6).T
        for part in table.split(_ROWS)
    ]
    weights = (sharpness * torch.cat(cosines, -1)).softmax(-1)
    return (weights.to(table.dtype) @ table).to(outputs.dtype)
