"""Exact tests of paired differences, and correction for multiple claims."""

import math
from collections.abc import Sequence

import numpy as np

MOST_PAIRS = 20
"""More have too many sign patterns to go through."""


def sign_flip_p(differences: Sequence[float]) -> float:
    """One-sided p of the exact paired permutation test that the mean is above 0.

    If the arms of a pair were interchangeable, every pattern of signs would be as likely as the one
    that was seen: p is the share of the `2^n` patterns whose mean is at least as high. Its least
    value is `1 / 2^n`.

    Args:
        differences: one for each pair, 1 to `MOST_PAIRS`.

    Raises:
        ValueError: If there are none or too many.
    """
    values = _checked(differences)
    sums = _signs(len(values)) @ values
    tolerance = 1e-12 * np.abs(values).sum()
    return float(np.mean(sums >= values.sum() - tolerance))


def interval(differences: Sequence[float], alpha: float) -> tuple[float, float]:
    """Confidence interval of the mean difference, of at least `1 - alpha`.

    The means of all non-empty subsets of the differences cut the line into `2^n` pieces that hold
    the centre of a symmetric distribution with equal probability. The interval leaves out the same
    number of pieces at both ends.

    Args:
        differences: one for each pair, 1 to `MOST_PAIRS`.
        alpha: probability that the interval misses.

    Returns:
        Its ends; infinite where there are too few pairs.

    Raises:
        ValueError: If there are none or too many.

    Reference: Hartigan, "Using subsample values as typical values", 1969.
    """
    values = _checked(differences)
    chosen = (_signs(len(values)) + 1) / 2
    sizes = chosen.sum(1)
    means = np.sort((chosen @ values)[sizes > 0] / sizes[sizes > 0])
    left_out = math.floor(alpha / 2 * 2 ** len(values))
    if left_out < 1:
        return -math.inf, math.inf
    return float(means[left_out - 1]), float(means[-left_out])


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values by Holm's step-down method, in the order that they were given.

    A claim whose adjusted value is at most alpha holds with a probability of at most alpha that any
    such claim is wrong.

    Reference: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _checked(differences: Sequence[float]) -> np.ndarray:
    if not 1 <= len(differences) <= MOST_PAIRS:
        raise ValueError(f"differences ({len(differences)}) must be 1 to {MOST_PAIRS}")
    return np.asarray(differences, dtype=np.float64)


def _signs(count: int) -> np.ndarray:
    """All patterns of signs `[2^n, n]`."""
    bits = np.arange(2**count)[:, None] >> np.arange(count)
    return 1.0 - 2.0 * (bits & 1)
