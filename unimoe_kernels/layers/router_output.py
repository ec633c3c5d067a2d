"""`RouterOutput`: the output of a router."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RouterOutput(NamedTuple):
    """Output of `TopKRouter`: scores and ids of the chosen experts, load and losses.

    Attributes:
        scores: `[T, K]`, float32 (float64 for float64 layers), weights of the chosen experts, best
            choice first.
        ids: `[T, K]`, int32, the chosen experts: 0 to E - 1 have weights. Ids of E or more are null
            experts (`is_null`) or dropped choices (`is_dropped`), which all operators skip.
        tokens_per_expert: `[E + Z]`, int32, number of rows routed to each expert, the Z null
            experts last; masked tokens included.
        load_balancing_loss: Scalar in the dtype of `scores`; 1 if the load is even.
        router_z_loss: Scalar in the dtype of `scores`.
        shared_scores: `[T, S]`, weights of the shared experts that the router scores together with
            the chosen ones, or None.
        num_null_experts: Number of null experts Z.
    """

    scores: Tensor
    ids: Tensor
    tokens_per_expert: Tensor
    load_balancing_loss: Tensor
    router_z_loss: Tensor
    shared_scores: Tensor | None = None
    num_null_experts: int = 0

    @property
    def num_experts(self) -> int:
        """Number of experts with weights, E."""
        return self.tokens_per_expert.shape[0] - self.num_null_experts

    @property
    def is_null(self) -> Tensor:
        """`[T, K]`, bool: choices of a null expert, whose output is zero."""
        return (self.ids >= self.num_experts) & ~self.is_dropped

    @property
    def is_dropped(self) -> Tensor:
        """`[T, K]`, bool: choices dropped by `top_p` or because their expert was full."""
        return self.ids >= self.tokens_per_expert.shape[0]
