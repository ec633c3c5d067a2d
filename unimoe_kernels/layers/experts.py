"""`GroupedExperts`: the experts of a layer as stacked weights, with or without LoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from unimoe_kernels._renamed import warn_renamed
from unimoe_kernels.layers._inputs import (
    autocasts,
    check_hidden,
    check_positive,
    local_part,
    weight_of,
)
from unimoe_kernels.layers.expert_lora import (
    HALVES,
    ExpertLoRADict,
    attach,
    check_attachable,
    merge_and_unload,
    new_lora,
    unmerged_lora,
)
from unimoe_kernels.ops import ExpertWeights, run_experts, swiglu

# Parameters in the order of `ExpertWeights`.
_WEIGHTS = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")


class GroupedExperts(nn.Module):
    """E gated feed-forward experts in two stacked weights.

    Expert e maps a row x to `down_proj[e] @ (act(gate) * up)` with
    `[gate; up] = gate_up_proj[e] @ x`. The layout is that of transformers checkpoints.

    Attributes:
        gate_up_proj: `[E, 2F, D]`, gate rows first.
        down_proj: `[E, D, F]`.
        gate_up_bias: `[E, 2F]`, or None without bias.
        down_bias: `[E, D]`, or None without bias.
        expert_lora: an `ExpertLoRADict`, or None without LoRA. If its `is_merged` is True, the
            weights include the LoRA, and the forward does not add it.
        dispatcher: None, or an object that sends rows to experts of other ranks and returns their
            outputs (`unimoe_kernels.distributed`). The weights are then DTensors, of which each
            rank holds its own experts, and ids refer to the experts of all ranks.

    Args:
        num_experts: E, at least 1.
        hidden_size: D.
        intermediate_size: F.
        activation: `"silu"`, `"gelu"`, `"gelu_tanh"`, `"relu"` or `"swiglu_clamped"`; see `swiglu`.
        bias: whether experts have biases; they start at zero.
        lora_rank: r; a value above 0 is equivalent to calling `add_lora`.
        lora_alpha: the LoRA product is scaled by `lora_alpha / lora_rank`.
        initializer_range: standard deviation of the initial weights, 0.02 as in LLaMA.
        device: device of the weights.
        dtype: dtype of the weights.

    Raises:
        ValueError: If a size is below 1, lora_rank is negative or the activation is unknown.
    """

    expert_lora: ExpertLoRADict | None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "silu",
        bias: bool = False,
        lora_rank: int = 0,
        lora_alpha: float = 16,
        initializer_range: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(
            num_experts=num_experts, hidden_size=hidden_size, intermediate_size=intermediate_size
        )
        if lora_rank < 0:
            raise ValueError(f"lora_rank ({lora_rank}) must be at least 0")
        # The operator checks the name; call it with zero rows.
        swiglu(torch.empty(0, 2, device="meta"), activation)
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.activation = activation
        self.initializer_range = initializer_range
        self.dispatcher: Callable[..., torch.Tensor] | None = None
        self.register_module("expert_lora", None)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        self.gate_up_proj = parameter(2 * intermediate_size, hidden_size)
        self.down_proj = parameter(hidden_size, intermediate_size)
        self.gate_up_bias = parameter(2 * intermediate_size) if bias else None
        self.down_bias = parameter(hidden_size) if bias else None
        self.reset_parameters()
        if lora_rank > 0:
            self.add_lora(lora_rank, lora_alpha)

    def reset_parameters(self) -> None:
        """Reinitialises the weights (normal), biases (zero) and LoRA (zero product)."""
        nn.init.normal_(self.gate_up_proj, std=self.initializer_range)
        nn.init.normal_(self.down_proj, std=self.initializer_range)
        for bias in (self.gate_up_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)
        loras: Any = self.expert_lora or {}
        for lora in loras.values():
            lora.reset_parameters()

    @property
    def lora_rank(self) -> int:
        """Rank of the LoRA, 0 without LoRA."""
        loras: Any = self.expert_lora or {}
        return next((lora.rank for lora in loras.values()), 0)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Runs each token through its top-k experts and returns the score-weighted sum.

        Args:
            x: `[T, D]`, dtype and device of the weights (under torch.autocast any of float32,
                bfloat16, float16).
            ids: `[T, K]`, int32 or int64; an id of E or more is skipped and contributes zero.
            scores: `[T, K]`, float32 (float64 for float64 weights).

        Returns:
            `[T, D]`, dtype of x, or of torch.autocast if it is enabled.

        Raises:
            ValueError: If x is not `[T, D]` on the device of the weights, or ids or scores are not
                `[T, K]`.
            TypeError: If the dtype of x differs from that of the weights.
        """
        self._check_hidden(x)
        if x.dim() != 2:
            raise ValueError(f"x (shape {tuple(x.shape)}) must be [T, D]")
        if ids.dim() != 2 or ids.shape[0] != x.shape[0]:
            raise ValueError(f"ids (shape {tuple(ids.shape)}) must be [T, K] with T = {x.shape[0]}")
        if scores.shape != ids.shape:
            raise ValueError(
                f"scores (shape {tuple(scores.shape)}) must have the shape of ids "
                f"{tuple(ids.shape)}"
            )
        if self.dispatcher is None:
            return self._answer(x, ids, scores)
        return self.dispatcher(self._answer, self._cast(x), ids, scores)

    def _answer(self, x: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Runs `forward` on the experts of this rank, whose ids start at 0."""
        lora = unmerged_lora(self)
        return run_experts(
            x,
            ids,
            scores,
            self._weights(),
            self.activation,
            correct_first=None if lora is None else lora.correct_first,
            correct_down=None if lora is None else lora.correct_down,
        )

    def _weights(self) -> ExpertWeights:
        """Returns the weights on this rank."""
        held: list[Any] = [local_part(weight_of(self, name)) for name in _WEIGHTS]
        return ExpertWeights(*held)

    def _check_hidden(self, x: torch.Tensor) -> None:
        """Checks width, device and dtype of x."""
        check_hidden(x, weight_of(self, "gate_up_proj"), self.hidden_size)

    def add_lora(
        self,
        rank: int,
        alpha: float = 16,
        *,
        freeze_base: bool = True,
        split_gate_up: bool = False,
    ) -> None:
        """Adds LoRA to both projections of every expert: `W + alpha/rank * B @ A`.

        A is initialised Kaiming uniform with a = sqrt(5) and B with zeros, so the output does not
        change.

        Args:
            rank: r, at least 1.
            alpha: numerator of the scale. It is not part of the state dict.
            freeze_base: whether to freeze weights and biases, which is the usual way to train LoRA.
            split_gate_up: whether the gate and up halves of `gate_up_proj` have separate
                corrections, each of rank r, as if they were two linear layers.

        Raises:
            ValueError: If rank is below 1.
            RuntimeError: If the experts already have LoRA, or are sharded; add LoRA before
                sharding.

        Reference:
            LoRA, arXiv 2106.09685.
        """
        check_positive(rank=rank)
        if self.lora_rank > 0:
            raise RuntimeError(
                f"the experts already have LoRA of rank {self.lora_rank}; call"
                " merge_and_unload_lora() first"
            )
        if self.dispatcher is not None:
            raise RuntimeError("LoRA must be added before the experts are split between ranks")
        check_attachable(self)
        if freeze_base:
            for base in self.parameters():
                base.requires_grad_(False)
        targets = (*(HALVES if split_gate_up else ("gate_up_proj",)), "down_proj")
        attach(self, {target: new_lora(self, target, rank, alpha) for target in targets})

    def merge_and_unload_lora(self) -> None:
        """Adds the LoRA products to the weights in place and removes the LoRA parameters.

        The product is computed in float32 (float64 for float64 weights) and rounded once to the
        dtype of the weight. `requires_grad` of the weights does not change.

        Raises:
            RuntimeError: If the experts have no LoRA.
        """
        if self.lora_rank == 0:
            raise RuntimeError("the experts have no LoRA to merge; call add_lora() first")
        merge_and_unload(self)

    def merge_lora(self) -> None:
        """Deprecated name of `merge_and_unload_lora`."""
        warn_renamed("GroupedExperts.merge_lora", "GroupedExperts.merge_and_unload_lora")
        self.merge_and_unload_lora()

    def _cast(self, x: torch.Tensor) -> torch.Tensor:
        """Casts x to the dtype of torch.autocast, if enabled, in which it is sent between ranks."""
        if not autocasts(x, self.gate_up_proj):
            return x
        return x.to(torch.get_autocast_dtype(x.device.type))

    def extra_repr(self) -> str:
        """Returns the options shown by `print(module)`."""
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, activation={self.activation!r}, "
            f"bias={self.gate_up_bias is not None}, lora_rank={self.lora_rank}"
        )
