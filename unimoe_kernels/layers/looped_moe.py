"""The mixture-of-experts layer as published in Uni-MoE: reference and baseline of `MoE`."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from unimoe_kernels._renamed import warn_renamed
from unimoe_kernels.layers._inputs import check_hidden, check_positive, check_top_k, unflatten


class SwiGLUFFN(nn.Module):
    """The feed-forward block of LLaMA: `down_proj(silu(gate_proj(x)) * up_proj(x))`, no biases.

    Args:
        hidden_size: D.
        intermediate_size: F.
        initializer_range: standard deviation of the initial weights.
        device: device of the weights.
        dtype: dtype of the weights.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        initializer_range: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(hidden_size=hidden_size, intermediate_size=intermediate_size)
        options: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, **options)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, **options)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, **options)
        # On the meta device, initialisation takes milliseconds and has no effect.
        for projection in (self.gate_proj, self.up_proj, self.down_proj):
            if not projection.weight.is_meta:
                nn.init.normal_(projection.weight, std=initializer_range)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps `[..., D]` to `[..., D]`."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LoopedMoE(nn.Module):
    """A `ModuleList` of FFNs and a Python loop over it, as in the released Uni-MoE code.

    For each token: top-k on the router's logits, softmax over the k chosen logits in float32 cast
    back to the dtype of x (float64 stays float64), then the weighted sum of the chosen FFNs. The
    keys of its state dict are the published ones: `gate.weight`,
    `experts.{e}.{gate_proj,up_proj,down_proj}.weight`. Use it to load published weights, and as a
    reference and baseline for `MoE`.

    Args:
        hidden_size: D.
        intermediate_size: F.
        num_experts: E, at least 1.
        top_k: K, between 1 and E.
        initializer_range: standard deviation of the initial weights.
        device: device of the weights.
        dtype: dtype of the weights.

    Raises:
        ValueError: If a size is below 1 or top_k is above num_experts.

    Note:
        The loop synchronises with the device once per expert and cannot be compiled as one graph.

    Reference:
        HITsz-TMG/Uni-MoE, Uni_MoE/Uni_MoE_speech/model/moe/moe.py (arXiv 2405.11273).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        initializer_range: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(hidden_size=hidden_size, intermediate_size=intermediate_size)
        check_top_k(top_k, num_experts)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.gate = nn.Linear(hidden_size, num_experts, bias=False, device=device, dtype=dtype)
        nn.init.normal_(self.gate.weight, std=initializer_range)
        self.experts = nn.ModuleList(
            SwiGLUFFN(
                hidden_size,
                intermediate_size,
                initializer_range=initializer_range,
                device=device,
                dtype=dtype,
            )
            for _ in range(num_experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the layer.

        Args:
            x: `[..., D]`, dtype and device of the weights.

        Returns:
            A tensor in the shape and dtype of x.

        Raises:
            ValueError: If the last dimension of x is not D, or x is on another device.
            TypeError: If the dtype of x differs from that of the weights.
        """
        check_hidden(x, self.gate.weight, self.hidden_size)
        x_TD = x.reshape(-1, self.hidden_size)
        chosen_TK, ids_TK = torch.topk(self.gate(x_TD), self.top_k)
        softmax_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        scores_TK = torch.softmax(chosen_TK, dim=-1, dtype=softmax_dtype).to(x.dtype)
        y_TD = torch.zeros_like(x_TD)
        for expert_id, expert in enumerate(self.experts):
            token, choice = torch.where(ids_TK == expert_id)
            rows = scores_TK[token, choice, None] * expert(x_TD[token])
            y_TD[token] += rows.to(y_TD.dtype)
        return unflatten(y_TD, x.shape)

    @staticmethod
    def from_moe(moe: ConvertsToLooped) -> LoopedMoE:
        """Deprecated name of `MoE.to_looped`."""
        warn_renamed("LoopedMoE.from_moe(moe)", "moe.to_looped()")
        return moe.to_looped()


class ConvertsToLooped(Protocol):
    """A layer with a `to_looped` method, such as `MoE`."""

    def to_looped(self) -> LoopedMoE:
        """Returns a copy as a `LoopedMoE`."""
