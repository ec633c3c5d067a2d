"""LoRA on the stacked weights of experts, without building what it adds to them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimoe_kernels.layers._inputs import check_positive, local_part
from unimoe_kernels.ops import grouped_lora

HALVES = ("gate_proj", "up_proj")
TARGETS = ("gate_up_proj", *HALVES, "down_proj")


class ExpertLoRA(nn.Module):
    """The low-rank correction of one projection of all experts: `scale * B[e] @ (A[e] @ x)`.

    A starts Kaiming uniform with a = sqrt(5) and B at zero, so that nothing changes at first.

    Attributes:
        lora_A: `[E, r, in]` parameter.
        lora_B: `[E, out, r]` parameter.
        scale: `alpha / r`.
        dropout: probability with which numbers of x are dropped in training.

    Args:
        num_experts: E.
        in_features: columns of the projection.
        out_features: rows of the projection.
        rank: r, at least 1.
        alpha: numerator of the scale.
        dropout: from 0 to below 1.
        device: device of the weights.
        dtype: dtype of the weights.

    Raises:
        ValueError: if a size is below 1 or dropout is out of range.

    Reference:
        LoRA, arXiv 2106.09685.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_experts=num_experts, r=rank)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout ({dropout}) must be at least 0 and below 1")
        options = {"device": device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.empty(num_experts, rank, in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(num_experts, out_features, rank, **options))
        self.scale = alpha / rank
        self.dropout = dropout
        self.reset_parameters()

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.lora_A.shape[1]

    def reset_parameters(self) -> None:
        """Draws A anew and zeroes B."""
        # kaiming_uniform_ with a = sqrt(5) on each expert's matrix: bound 1 / sqrt(columns).
        bound = self.lora_A.shape[2] ** -0.5
        nn.init.uniform_(self.lora_A, -bound, bound)
        nn.init.zeros_(self.lora_B)

    def forward(self, rows: Tensor, expert_offsets: Tensor) -> Tensor:
        """What is added to the product of the projection, `[N, out]`.

        Args:
            rows: `[N, in]` in expert order.
            expert_offsets: `[E + 1]`, int32, as `expert_sort` gives it.
        """
        rows = F.dropout(rows, self.dropout, self.training)
        lora_A, lora_B = (local_part(w).to(rows.dtype) for w in (self.lora_A, self.lora_B))
        return grouped_lora(rows, lora_A, lora_B, expert_offsets, self.scale)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """What the correction adds to the weight, `[E, out, in]` in at least float32."""
        wide = torch.float64 if self.lora_A.dtype == torch.float64 else torch.float32
        return self.scale * (self.lora_B.to(wide) @ self.lora_A.to(wide))

    def extra_repr(self) -> str:
        """What print(module) shows between the parentheses."""
        return f"r={self.rank}, scale={self.scale}, dropout={self.dropout}"


def add_lora_of_first(
    lora: nn.ModuleDict | None, hidden: Tensor, rows: Tensor, expert_offsets: Tensor
) -> Tensor:
    """Adds the corrections of `gate_up_proj`, or of its two halves, to its product `[N, 2F]`."""
    if lora is None:
        return hidden
    if "gate_up_proj" in lora:
        return hidden + lora["gate_up_proj"](rows, expert_offsets)
    halves = {name: lora[name](rows, expert_offsets) for name in HALVES if name in lora}
    if not halves:
        return hidden
    zeros = hidden.new_zeros(hidden.shape[0], hidden.shape[1] // 2)
    return hidden + torch.cat([halves.get(name, zeros) for name in HALVES], dim=1)


def add_lora_of_down(
    lora: nn.ModuleDict | None, out: Tensor, rows: Tensor, expert_offsets: Tensor
) -> Tensor:
    """Adds the correction of `down_proj` to its product `[N, D]`."""
    if lora is None or "down_proj" not in lora:
        return out
    return out + lora["down_proj"](rows, expert_offsets)


def weight_of(experts: nn.Module, target: str) -> Tensor:
    """What a target's LoRA is added to, as `[E, out, in]`: a view of one of the stacked weights.

    Raises:
        ValueError: if the experts have no such weight.
    """
    weight = getattr(experts, "gate_up_proj" if target in HALVES else target, None)
    if weight is None:
        raise ValueError(f"target ({target}) is no weight of {type(experts).__name__}")
    weight_EOI = weight.detach()
    if getattr(experts, "is_transposed", False):
        weight_EOI = weight_EOI.transpose(1, 2)
    return weight_EOI.chunk(2, dim=1)[HALVES.index(target)] if target in HALVES else weight_EOI


@torch.no_grad()
def add_deltas(experts: nn.Module, sign: float) -> None:
    """Adds `sign` times what the LoRA of experts stands for to their weights, in place."""
    for target, lora in experts.expert_lora.items():
        weight_EOI, delta_EOI = weight_of(experts, target), lora.delta()
        weight_EOI.copy_(weight_EOI.to(delta_EOI.dtype) + sign * delta_EOI)
