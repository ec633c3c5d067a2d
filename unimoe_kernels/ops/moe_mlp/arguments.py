"""Structures for the arguments of `moe_mlp`; operator schemas support only flat arguments."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from unimoe_kernels.quantization.weight import QuantizedWeight


class ExpertWeights(NamedTuple):
    """Stacked weights of E experts; either both projections are quantised or neither is.

    Attributes:
        first: `[E, G, D]`, the projection before the activation; G is 2F with a gate (gate rows
            first), else F.
        down: `[E, D, F]`.
        first_bias: `[E, G]` or None.
        down_bias: `[E, D]` or None.
    """

    first: Tensor | QuantizedWeight
    down: Tensor | QuantizedWeight
    first_bias: Tensor | None
    down_bias: Tensor | None


class Gate(NamedTuple):
    """The activation and its constants; see `swiglu`."""

    activation: str
    limit: float
    alpha: float


class Rows(NamedTuple):
    """The order of the N = T * K routed rows, as returned by `expert_sort`.

    Attributes:
        order: `[N]` int32, the routed row at each position in expert order.
        inverse: `[N]` int32, the position of each routed row.
        offsets: `[E + 1]` int32, the position of each expert's first row.
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor


class Saved(NamedTuple):
    """What the forward saves for the backward.

    Attributes:
        x: `[T, D]`.
        scores: `[T, K]`.
        weights: the weights of the forward; `first_bias` is not read.
        hidden: `[N, 2F]`, the pre-activations.
        rows: the order of the rows.
    """

    x: Tensor
    scores: Tensor
    weights: ExpertWeights
    hidden: Tensor
    rows: Rows


class Needs(NamedTuple):
    """Which gradients are required."""

    x: bool
    first: bool
    down: bool
    scores: bool
    first_bias: bool
    down_bias: bool


class Grads(NamedTuple):
    """Gradients, with the names of `Needs`; those that are not required may be empty."""

    x: Tensor
    first: Tensor
    down: Tensor
    scores: Tensor
    first_bias: Tensor
    down_bias: Tensor
