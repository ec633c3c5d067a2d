"""`RouterOutput`: what a router decides about a batch of tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RouterOutput(NamedTuple):
    """Where each token goes and how even the load is.

    Attributes:
        scores: `[T, K]`, float32 (float64 for float64 layers), weights of the chosen experts, best
            choice first.
        ids: `[T, K]`, int32, the chosen experts: 0 to E - 1 have weights. `is_null` and
            `is_dropped` tell what ids of E or more stand for; all operators skip them.
        tokens_per_expert: `[E + Z]`, int32, rows that each expert gets, the Z null experts last;
            masked tokens included.
        load_balancing_loss: Scalar in the dtype of `scores`; 1 when the load is even.
        router_z_loss: Scalar in the dtype of `scores`.
        shared_scores: `[T, S]`, weights of the shared experts that the router weighs together with
            the choice, or None.
        num_null_experts: Z.
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
        """E: how many experts have weights."""
        return self.tokens_per_expert.shape[0] - self.num_null_experts

    @property
    def is_null(self) -> Tensor:
        """`[T, K]`, bool: choices that fell on a null expert, whose output is zero."""
        return (self.ids >= self.num_experts) & ~self.is_dropped

    @property
    def is_dropped(self) -> Tensor:
        """`[T, K]`, bool: choices given up, for `top_p` or because their expert was full."""
        return self.ids >= self.tokens_per_expert.shape[0]
