"""The arguments of `moe_mlp` below its schema, which takes no structures."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from unimoe_kernels.quantization.weight import QuantizedWeight


class ExpertWeights(NamedTuple):
    """Stacked weights of E experts, both projections quantised or neither.

    Attributes:
        first: `[E, G, D]`, the projection before the activation; G is 2F where it has a gate, gate
            rows first, else F.
        down: `[E, D, F]`.
        first_bias: `[E, G]` or None.
        down_bias: `[E, D]` or None.
    """

    first: Tensor | QuantizedWeight
    down: Tensor | QuantizedWeight
    first_bias: Tensor | None
    down_bias: Tensor | None


class Gate(NamedTuple):
    """The activation and its constants, as in `swiglu`."""

    activation: str
    limit: float
    alpha: float


class Rows(NamedTuple):
    """Where the N = T * K routed rows lie, as `expert_sort` returns it.

    Attributes:
        order: `[N]` int32, the routed row at each position in expert order.
        inverse: `[N]` int32, the position of each routed row.
        offsets: `[E + 1]` int32, where the rows of each expert begin.
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor


class Saved(NamedTuple):
    """What the forward keeps for the backward.

    Attributes:
        x: `[T, D]`.
        scores: `[T, K]`.
        weights: those of the forward; its `first_bias` is not read.
        hidden: `[N, 2F]`, the pre-activations.
        rows: where the rows lie.
    """

    x: Tensor
    scores: Tensor
    weights: ExpertWeights
    hidden: Tensor
    rows: Rows


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    first: bool
    down: bool
    scores: bool
    first_bias: bool
    down_bias: bool


class Grads(NamedTuple):
    """Gradients, by the names of `Needs`; those that are not asked for may be empty."""

    x: Tensor
    first: Tensor
    down: Tensor
    scores: Tensor
    first_bias: Tensor
    down_bias: Tensor
