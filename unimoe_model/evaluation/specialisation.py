"""Dependence of routing on the modality: entropy and mutual information."""

from collections.abc import Mapping

import torch
from torch import Tensor


def expert_entropy(taken: Mapping[str, Tensor]) -> Tensor:
    """Entropy of the expert of a routed row, over all modalities.

    Args:
        taken: number of routed rows per expert, `[layers, E]`, by modality.

    Returns:
        `[layers]` float64, bits: 0 if one expert takes all rows, `log2(E)` if all take the same
        number.
    """
    return _entropy(sum(rows.double() for rows in taken.values()))


def mutual_information(taken: Mapping[str, Tensor]) -> Tensor:
    """Mutual information of the modality of a token and the expert of one of its routed rows.

    All modalities have equal weight, regardless of their number of tokens: with `p(e | m)` the
    share of the rows of modality `m` that expert `e` takes and `p(m) = 1 / M`,
    `I = H(sum_m p(m) p(e | m)) - sum_m p(m) H(p(e | m))`.

    Args:
        taken: number of routed rows per expert, `[layers, E]`, by modality. Modalities without rows
            are ignored.

    Returns:
        `[layers]` float64, bits: 0 if routing does not depend on the modality, at most `log2(M)`.

    Raises:
        ValueError: If no modality has rows.
    """
    shares = [
        rows.double() / rows.sum(1, keepdim=True) for rows in taken.values() if bool(rows.sum() > 0)
    ]
    if not shares:
        raise ValueError("taken must hold rows of at least one modality")
    p_MLE = torch.stack(shares)
    information_L = _entropy(p_MLE.mean(0)) - _entropy(p_MLE).mean(0)
    return information_L.clamp_min(0)


def top_experts(taken: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Index of the expert with the most rows of each modality, by layer.

    Args:
        taken: number of routed rows per expert, `[layers, E]`, by modality.
    """
    return {modality: rows.argmax(1).tolist() for modality, rows in taken.items() if rows.sum() > 0}


def _entropy(counts: Tensor) -> Tensor:
    """Entropy over the last dimension, in bits."""
    p = counts / counts.sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1) / torch.log(torch.tensor(2.0, dtype=p.dtype))
