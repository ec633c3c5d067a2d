"""`MoE`: the mixture-of-experts layer, with router, experts and auxiliary losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import torch
from torch import nn

from unimoe_kernels.layers._inputs import check_at_least_zero, unflatten
from unimoe_kernels.layers.aux_loss import inject_aux_loss
from unimoe_kernels.layers.experts import GroupedExperts
from unimoe_kernels.layers.layouts import ffn_weights
from unimoe_kernels.layers.looped_conversion import looped_of
from unimoe_kernels.layers.looped_moe import LoopedMoE
from unimoe_kernels.layers.router import TopKRouter
from unimoe_kernels.layers.router_config import (
    RouterConfig,
    RouterOptions,
    config_with,
    shows_router_options,
)
from unimoe_kernels.layers.router_output import RouterOutput

_AUX_LOSS_MODES = ("return", "inject")
_SHARED_SCORES = ("one", "sigmoid", "softmax")


class MoEOptions(RouterOptions, total=False):
    """Keyword arguments of `MoE` that are not determined by given FFNs, for type checkers."""

    router_config: RouterConfig | None
    activation: str
    load_balancing_coef: float
    router_z_coef: float
    aux_loss: str
    num_shared_experts: int
    shared_intermediate_size: int | None
    shared_scores: str
    initializer_range: float


@shows_router_options
class MoE(nn.Module):
    """A drop-in replacement for a feed-forward block: `[..., D] -> [..., D]`.

    A forward takes five steps:

    1. The router scores all experts for every token and selects `top_k` of `num_experts`.
    2. The routed rows are sorted by expert, so that the rows of each expert are contiguous.
    3. Every expert computes its feed-forward block on its rows, in two grouped matmuls.
    4. The outputs of each token's experts are weighted by score and summed.
    5. The outputs of shared experts, which process every token, are added; auxiliary losses are
       returned or injected.

    With the default options it computes the same as `LoopedMoE`; other options reproduce the layers
    of most published mixture-of-experts models:

    ================================  ===========================================================
    options                           layer of
    ================================  ===========================================================
    `mode="softmax_topk_renorm"`      Qwen3-MoE; without `_renorm` OLMoE
    `mode="sigmoid_renorm"`,          DeepSeek-V3, with `num_groups`, `top_groups`, `scale` and
    `correction_bias=True`            `num_shared_experts=1`; `router.update_correction_bias`
                                      balances the load
    `mode="softmax_topk"`,            Qwen2-MoE
    `num_shared_experts=1`,
    `shared_scores="sigmoid"`
    `mode="sparsemixer_renorm"`,      DCMoE and Uni-MoE-2.0: a variable number of experts, with
    `top_p=0.7`, `top_k=5`,           `num_shared_experts=2` and `shared_scores="softmax"`
    `num_null_experts=1`
    `mode="softmax_topk"`, `top_k=1`, Switch Transformers
    `capacity_factor=1.25`,
    `balance="first"`, `jitter=0.01`
    ================================  ===========================================================

    Auxiliary losses. With `aux_loss="return"`, training code calls `moe(x, return_router=True)` and
    adds `moe.aux_loss_of(router_output)` to its loss. `aux_loss="inject"` is for models whose
    blocks return only hidden states: the gradient of the same sum is added in the backward of y
    (see `inject_aux_loss`), and the losses in a returned `RouterOutput` are detached so that they
    are not counted twice. The layer stores no state in a forward, so activation checkpointing,
    gradient accumulation and `no_grad` work as usual. If the model's own loss is multiplied by a
    factor (1/accumulation steps, a GradScaler's scale), set `aux_loss_scale` to the same factor.

    Attributes:
        router: `TopKRouter`, weight `router.weight` `[E, D]`.
        experts: `GroupedExperts`, weights `experts.gate_up_proj` `[E, 2F, D]` and
            `experts.down_proj` `[E, D, F]`; `experts.add_lora` adds LoRA.
        shared_experts: `GroupedExperts` that process every token, or None.
        shared_gate: a bias-free `Linear` from D to the number of shared experts, with
            `shared_scores="sigmoid"`; else None.
        load_balancing_coef: coefficient of the load-balancing loss.
        router_z_coef: coefficient of the router z-loss.
        aux_loss: `"return"` or `"inject"`.
        aux_loss_scale: factor on the injected gradient, initially 1.0; unused with `"return"`.

    Args:
        hidden_size: D.
        intermediate_size: F, the width of one expert.
        num_experts: E, at least 1.
        top_k: K, between 1 and E.
        router_config: options of the router; None for the defaults.
        activation: activation of the experts' gate, see `swiglu`.
        bias: whether experts have biases.
        load_balancing_coef: at least 0.
        router_z_coef: at least 0.
        aux_loss: `"return"` or `"inject"`.
        num_shared_experts: number of additional experts that process every token; 0 for none.
        shared_intermediate_size: width of one shared expert; None is F.
        shared_scores: weights of the shared experts: `"one"`, `"sigmoid"` of a separate gate, or
            `"softmax"` together with the chosen experts (`num_weighed_experts` of `TopKRouter`).
        initializer_range: standard deviation of all initial weights, 0.02 as in LLaMA.
        device: device of the weights.
        dtype: dtype of the weights.
        **router_options: fields of `RouterConfig`, such as `mode`, `num_null_experts`, `top_p`,
            `capacity_factor`, `jitter` and `router_dtype`, which replace those of router_config.

    Raises:
        ValueError: If a size is below 1, top_k is above num_experts, a coefficient is negative, or
            an option has an unknown value.
        TypeError: If an option has an unknown name.

    Reference:
        Uni-MoE, arXiv 2405.11273. Load-balancing loss: Switch Transformers, arXiv 2101.03961, and
        GShard, arXiv 2006.16668. z-loss: ST-MoE, arXiv 2202.08906.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        router_config: RouterConfig | None = None,
        activation: str = "silu",
        bias: bool = False,
        load_balancing_coef: float = 0.0,
        router_z_coef: float = 0.0,
        aux_loss: str = "return",
        num_shared_experts: int = 0,
        shared_intermediate_size: int | None = None,
        shared_scores: str = "one",
        initializer_range: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **router_options: Unpack[RouterOptions],
    ) -> None:
        super().__init__()
        router_config = config_with(type(self).__name__, router_config, router_options)
        check_at_least_zero(
            load_balancing_coef=load_balancing_coef,
            router_z_coef=router_z_coef,
            num_shared_experts=num_shared_experts,
        )
        if aux_loss not in _AUX_LOSS_MODES:
            raise ValueError(f"aux_loss ({aux_loss!r}) must be one of {_AUX_LOSS_MODES}")
        if shared_scores not in _SHARED_SCORES:
            raise ValueError(f"shared_scores ({shared_scores!r}) must be one of {_SHARED_SCORES}")
        self.load_balancing_coef = load_balancing_coef
        self.router_z_coef = router_z_coef
        self.aux_loss = aux_loss
        self.aux_loss_scale = 1.0
        common: dict[str, Any] = {
            "initializer_range": initializer_range,
            "device": device,
            "dtype": dtype,
        }
        self.router = TopKRouter(
            hidden_size,
            num_experts,
            top_k,
            router_config=router_config,
            num_weighed_experts=num_shared_experts if shared_scores == "softmax" else 0,
            **common,
        )
        common |= {"activation": activation, "bias": bias}
        self.experts = GroupedExperts(num_experts, hidden_size, intermediate_size, **common)
        self.shared_scores = shared_scores
        self.shared_experts: GroupedExperts | None = None
        self.shared_gate: nn.Linear | None = None
        if num_shared_experts > 0:
            if shared_intermediate_size is None:
                shared_intermediate_size = intermediate_size
            self.shared_experts = GroupedExperts(
                num_shared_experts, hidden_size, shared_intermediate_size, **common
            )
        if num_shared_experts > 0 and shared_scores == "sigmoid":
            self.shared_gate = nn.Linear(
                hidden_size, num_shared_experts, bias=False, device=device, dtype=dtype
            )
            nn.init.normal_(self.shared_gate.weight, std=initializer_range)

    def reset_parameters(self) -> None:
        """Reinitialises all weights."""
        for part in (self.router, self.experts, self.shared_experts):
            if part is not None:
                part.reset_parameters()
        if self.shared_gate is not None:
            nn.init.normal_(self.shared_gate.weight, std=self.router.initializer_range)

    if TYPE_CHECKING:

        @overload
        def __call__(
            self,
            x: torch.Tensor,
            token_mask: torch.Tensor | None = None,
            return_router: Literal[False] = False,
            router_input: torch.Tensor | None = None,
        ) -> torch.Tensor: ...

        @overload
        def __call__(
            self,
            x: torch.Tensor,
            token_mask: torch.Tensor | None = None,
            *,
            return_router: Literal[True],
            router_input: torch.Tensor | None = None,
        ) -> tuple[torch.Tensor, RouterOutput]: ...

        @overload
        def __call__(
            self,
            x: torch.Tensor,
            token_mask: torch.Tensor | None,
            return_router: Literal[True],
            router_input: torch.Tensor | None = None,
        ) -> tuple[torch.Tensor, RouterOutput]: ...

        def __call__(self, *args, **kwargs):
            """Applies the layer; see `forward`."""

    def forward(
        self,
        x: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        return_router: bool = False,
        router_input: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, RouterOutput]:
        """Applies the layer.

        Args:
            x: `[..., D]`, dtype and device of the weights (under torch.autocast any of float32,
                bfloat16, float16); may have no tokens.
            token_mask: bool, the shape of x without its last dimension. Tokens with False are
                excluded from the losses but routed and computed like all others. None means all
                True.
            return_router: whether to return the router's output as well.
            router_input: input of the router, in the shape of x; None is x. Experts always read x.

        Returns:
            y in the shape of x; with return_router `(y, RouterOutput)`, whose T tokens are the
            leading dimensions of x flattened.

        Raises:
            ValueError: If the shape or device of x, or the shape of token_mask or router_input is
                wrong.
            TypeError: If the dtype of x differs from that of the weights, or token_mask is not
                bool.
        """
        if router_input is not None and router_input.shape != x.shape:
            raise ValueError(
                f"router_input (shape {tuple(router_input.shape)}) must have the shape of x"
                f" {tuple(x.shape)}"
            )
        routed = self.router(x if router_input is None else router_input, token_mask)
        x_TD = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        y_TD = self.experts(x_TD, routed.ids, routed.scores)
        if self.shared_experts is not None:
            y_TD = y_TD + self._shared(self.shared_experts, x_TD, routed)
        y = unflatten(y_TD, x.shape)
        if self.aux_loss == "inject":
            if self.load_balancing_coef > 0 or self.router_z_coef > 0:
                y = inject_aux_loss(y, self.aux_loss_of(routed) * self.aux_loss_scale)
            routed = routed._replace(
                load_balancing_loss=routed.load_balancing_loss.detach(),
                router_z_loss=routed.router_z_loss.detach(),
            )
        return (y, routed) if return_router else y

    def _shared(
        self, experts: GroupedExperts, x_TD: torch.Tensor, routed: RouterOutput
    ) -> torch.Tensor:
        num_shared = experts.num_experts
        ids_S = torch.arange(num_shared, dtype=torch.int32, device=x_TD.device)
        if self.shared_scores == "softmax":
            weights_TS = routed.shared_scores
        elif self.shared_scores == "sigmoid":
            assert self.shared_gate is not None
            weights_TS = self.shared_gate(x_TD).sigmoid().to(routed.scores.dtype)
        else:
            weights_TS = routed.scores.new_ones(x_TD.shape[0], num_shared)
        return experts(x_TD, ids_S.expand(x_TD.shape[0], -1), weights_TS)

    def aux_loss_of(self, routed: RouterOutput) -> torch.Tensor:
        """Returns the auxiliary loss of a forward, `()`: both losses times their coefficients."""
        return (
            self.load_balancing_coef * routed.load_balancing_loss
            + self.router_z_coef * routed.router_z_loss
        )

    @classmethod
    def from_looped(cls, looped: LoopedMoE, **options: Unpack[MoEOptions]) -> MoE:
        """Copies the weights of a `LoopedMoE` into a new layer, bit for bit.

        Args:
            looped: the layer to copy; it is not changed.
            **options: `load_balancing_coef`, `router_z_coef`, `aux_loss` and `balance` of `MoE`.
        """
        moe = cls.from_ffns(list(looped.experts), looped.top_k, **options)
        with torch.no_grad():
            moe.router.weight.copy_(looped.gate.weight)
        return moe.train(looped.training)

    def to_looped(self) -> LoopedMoE:
        """Copies the weights into a new `LoopedMoE`, bit for bit.

        Raises:
            ValueError: If the published layer cannot represent this one: it requires mode
                `"topk_softmax"`, activation `"silu"`, no biases, no shared or null experts, and no
                unmerged LoRA. Also if weights are sharded.
        """
        num_shared = 0 if self.shared_experts is None else self.shared_experts.num_experts
        return looped_of(self.router, self.experts, num_shared).train(self.training)

    @classmethod
    def from_ffns(
        cls,
        ffns: Sequence[nn.Module | Mapping[str, torch.Tensor]],
        top_k: int,
        **options: Unpack[MoEOptions],
    ) -> MoE:
        """Creates a layer whose experts are copies of given dense SwiGLU blocks, with a new router.

        Copies of one trained FFN are sparse upcycling of a dense model; FFNs trained on one
        modality each are the third stage of Uni-MoE.

        Args:
            ffns: one per expert, in order: modules, or their state dicts, with exactly the keys
                `gate_proj.weight` `[F, D]`, `up_proj.weight` `[F, D]`, `down_proj.weight` `[D, F]`,
                all of one shape, dtype and device.
            top_k: K, between 1 and the number of ffns.
            **options: options of `MoE` except bias, device and dtype.

        Raises:
            ValueError: If ffns is empty, keys are missing or unexpected, or shapes, dtypes or
                devices differ.

        Reference:
            Sparse Upcycling, arXiv 2212.05055; Uni-MoE, arXiv 2405.11273, section 3.3.
        """
        weights = ffn_weights(ffns)
        gate_FD = weights[0][0]
        intermediate_size, hidden_size = gate_FD.shape
        moe = cls(
            hidden_size,
            intermediate_size,
            len(weights),
            top_k,
            dtype=gate_FD.dtype,
            device=gate_FD.device,
            **options,
        )
        with torch.no_grad():
            for expert_id, (gate_FD, up_FD, down_DF) in enumerate(weights):
                moe.experts.gate_up_proj[expert_id, :intermediate_size].copy_(gate_FD)
                moe.experts.gate_up_proj[expert_id, intermediate_size:].copy_(up_FD)
                moe.experts.down_proj[expert_id].copy_(down_DF)
        return moe
