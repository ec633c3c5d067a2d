"""Relative errors, tolerances and routings for tests of operators."""

from __future__ import annotations

import torch
from torch import Tensor

ROUTINGS = ("uniform", "zipf", "one_hot", "empty_experts")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Returns `max|actual - expected| / max|expected|`, computed in float64.

    Args:
        actual: Any shape and floating dtype.
        expected: Same shape, any floating dtype.

    Returns:
        0 for empty tensors and for two all-zero tensors; infinity if `actual` has a NaN or if
        `expected` alone is all zero.

    Raises:
        ValueError: If the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(
            f"actual (shape {tuple(actual.shape)}) must have the shape of expected "
            f"{tuple(expected.shape)}"
        )
    if actual.numel() == 0:
        return 0.0
    expected = expected.detach().double()
    difference = (actual.detach().to(expected) - expected).abs().max()
    if difference.isnan():
        return float("inf")
    size = expected.abs().max()
    return 0.0 if difference == 0 else (difference / size).item()


def assert_close_to_float64(
    actual: Tensor,
    expected: Tensor,
    baseline: Tensor | None = None,
    name: str = "output",
    dtype: torch.dtype | None = None,
) -> None:
    """Asserts that a result is as close to a float64 result as its dtype allows.

    The relative error must be at most 64 times the machine epsilon of `dtype`. With `baseline`, the
    result of the reference in that dtype, it must also be at most twice the error of `baseline`
    plus four times the machine epsilon.

    Args:
        actual: Result to test.
        expected: Expected result, float64. Must not be all zero.
        baseline: Result of the reference in the dtype of `actual`, or None.
        name: Name of the result in error messages.
        dtype: Lowest precision used in computing `actual`. Default: the dtype of `actual`.

    Raises:
        AssertionError: If the error is larger, or `expected` is not float64 or is all zero.
    """
    assert expected.dtype == torch.float64, f"{name}: expected ({expected.dtype}) must be float64"
    assert expected.numel() == 0 or expected.any(), f"{name}: expected is zero everywhere"
    epsilon = torch.finfo(dtype or actual.dtype).eps
    limit = 64 * epsilon
    if baseline is not None:
        limit = min(limit, 2 * relative_error(baseline, expected) + 4 * epsilon)
    error = relative_error(actual, expected)
    assert error <= limit, f"{name}: relative error {error:.3g} exceeds {limit:.3g}"


def sample_routing(
    kind: str,
    num_tokens: int,
    top_k: int,
    num_experts: int,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Draws random expert ids and scores; the experts of a token are distinct.

    Args:
        kind: `"uniform"`; `"zipf"`, expert e with weight `1 / (e + 1)`; `"one_hot"`, all tokens to
            the first K experts; `"empty_experts"`, all tokens to the last half of the experts (at
            least K of them).
        num_tokens: Number of tokens T.
        top_k: Number of experts per token K, at most E.
        num_experts: Number of experts E.
        seed: Seed; the same seed gives the same routing on every device.
        device: Device of the results.
        dtype: Dtype of the scores.

    Returns:
        Expert ids `[T, K]` int32 and scores `[T, K]`, positive and summing to 1 for each token.

    Raises:
        ValueError: If `kind` is unknown or `top_k` is more than `num_experts`.
    """
    if kind not in ROUTINGS:
        raise ValueError(f"kind ({kind!r}) must be one of {', '.join(ROUTINGS)}")
    if top_k > num_experts:
        raise ValueError(f"top_k ({top_k}) must be at most num_experts ({num_experts})")
    generator = torch.Generator().manual_seed(seed)
    expert_E = torch.arange(num_experts)
    if kind == "zipf":
        weight_E = 1 / (expert_E + 1.0)
    elif kind == "one_hot":
        weight_E = (expert_E < top_k).float()
    elif kind == "empty_experts":
        weight_E = (expert_E >= min(num_experts // 2, num_experts - top_k)).float()
    else:
        weight_E = torch.ones(num_experts)
    # The K smallest of exponential variables with these rates are K draws without replacement.
    times_TE = torch.empty(num_tokens, num_experts).exponential_(generator=generator) / weight_E
    ids_TK = times_TE.argsort(1)[:, :top_k].int()
    scores_TK = torch.randn(num_tokens, top_k, generator=generator).softmax(1)
    return ids_TK.to(device), scores_TK.to(device, dtype)
