"""The steps of a layer's experts, shared by all implementations."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from unimoe_kernels.ops.moe_mlp.arguments import ExpertWeights, Rows
from unimoe_kernels.quantization.weight import QuantizedWeight

# Calls an operator by name, such as `functools.partial(_backends.run, "default")`.
Run = Callable[..., object]
# Maps the product `[N, out]` of a projection, its input `[N, in]` and the offsets to a product.
Correction = Callable[[Tensor, Tensor, Tensor], Tensor]


def multiply(
    run: Run,
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """Multiplies rows `[N, in]` by `[E, out, in]`; `transposed`, rows `[N, out]` to `[N, in]`."""
    if isinstance(weight, QuantizedWeight):
        values, scales, zeros, format, _ = weight
        parts = (values, scales, zeros)
        return run("grouped_mm_quantized", x, *parts, offsets, bias, format, transposed)
    return run("grouped_mm", x, weight.transpose(1, 2) if transposed else weight, offsets, bias)


def sort_rows(run: Run, ids: Tensor, num_experts: int) -> Rows:
    """Sorts the routed rows of ids `[T, K]` by expert."""
    order, inverse, _, offsets = run("expert_sort", ids.view(-1), num_experts)
    return Rows(order, inverse, offsets)


def pre_activations(
    run: Run, x: Tensor, weights: ExpertWeights, rows: Rows, top_k: int
) -> tuple[Tensor, Tensor]:
    """Returns the rows `[N, D]` in expert order, and their product `[N, G]` with `first`."""
    x_ND = run("permute", x, rows.inverse, rows.offsets, top_k)
    return x_ND, multiply(run, x_ND, weights.first, rows.offsets, weights.first_bias)


def run_pipeline(
    run: Run,
    x: Tensor,
    ids: Tensor,
    scores: Tensor,
    weights: ExpertWeights,
    activate: Callable[[Tensor], Tensor],
    correct_first: Correction | None = None,
    correct_down: Correction | None = None,
) -> tuple[Tensor, Tensor, Rows]:
    """Runs sort, permutation, first projection, activation, second projection and weighted sum.

    Args:
        run: calls an operator by name.
        x: `[T, D]`, contiguous.
        ids: `[T, K]`, int32, contiguous.
        scores: `[T, K]`, in the accumulation dtype, contiguous.
        weights: weights of the experts, dtype of `x`.
        activate: maps pre-activations `[N, G]` to `[N, F]`, contiguous, dtype of `x`.
        correct_first: None, or a function applied to the product of `first`.
        correct_down: None, or a function applied to the product of `down`.

    Returns:
        The output `[T, D]`, the pre-activations `[N, G]` and the order of the rows.
    """
    top_k = ids.shape[1]
    rows = sort_rows(run, ids, weights.first.shape[0])
    x_ND, hidden_NG = pre_activations(run, x, weights, rows, top_k)
    if correct_first is not None:
        hidden_NG = correct_first(hidden_NG, x_ND, rows.offsets)
    act_NF = activate(hidden_NG)
    out_ND = multiply(run, act_NF, weights.down, rows.offsets, weights.down_bias)
    if correct_down is not None:
        out_ND = correct_down(out_ND, act_NF, rows.offsets).contiguous()
    y_TD = run("unpermute", out_ND, rows.inverse, rows.offsets, scores, top_k)
    return y_TD, hidden_NG, rows
