"""`TopKRouter`: a bias-free projection, top-k selection and its post-processing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import nn

from unimoe_kernels.layers._inputs import (
    check_at_least_zero,
    check_hidden,
    check_positive,
    check_top_k,
    flatten_mask,
    weight_of,
)
from unimoe_kernels.layers.router_config import (
    RouterConfig,
    RouterOptions,
    config_with,
    moved_to_config,
    shows_router_options,
)
from unimoe_kernels.layers.router_output import RouterOutput
from unimoe_kernels.layers.selection import (
    expert_capacity,
    share,
    sparsemixer_scores,
    within_capacity,
    within_top_p,
)
from unimoe_kernels.ops import expert_sort, router_losses, topk_router


@shows_router_options
class TopKRouter(nn.Module):
    """Selects up to `top_k` of `num_experts` experts for every token.

    Computes `logits = x @ weight.T` and calls `topk_router`, which computes in float32 (float64 for
    float64 inputs) and breaks ties in favour of the lower id. Ids E to E + Z - 1 are null experts,
    and E + Z is a dropped choice; `GroupedExperts` and `moe_mlp` skip both.

    Attributes:
        config: the frozen `RouterConfig`; assign another one to change options other than
            `correction_bias` and `num_null_experts`, which determine the shapes of the weights.
        weight: `[E + Z + S, D]` parameter, normal with standard deviation `initializer_range`.
        correction_bias: `[E + Z]` buffer, initially zero, or None. Casting the layer leaves it
            float32. It affects the selection of experts but not their scores;
            `update_correction_bias` balances the load with it.
        sum_over_ranks: None, or a function that sums a tensor of counts over all ranks that share a
            batch (`unimoe_kernels.distributed`). If gradients are recorded, both losses are then
            this rank's share of the losses of all tokens: the shares sum to these losses, and so do
            their gradients.

    Args:
        hidden_size: D.
        num_experts: E, at least 1.
        top_k: K, between 1 and E + Z.
        router_config: options; None for the defaults.
        num_weighed_experts: S, number of shared experts, which process every token, to be scored by
            the router. Their scores and those of the chosen experts come from one softmax, in which
            the chosen experts keep their relative proportions.
        initializer_range: standard deviation of the initial weight, 0.02 as in LLaMA.
        device: device of the weight.
        dtype: dtype of the weight.
        **router_options: fields of `RouterConfig`, which replace those of router_config.

    Raises:
        ValueError: If a size is below 1, an option is out of range, top_k is above the number of
            experts, or `topk_router` rejects the mode, groups or balance.
        TypeError: If an option has an unknown name.

    Reference:
        Weighed shared experts: Uni-MoE-2.0, arXiv 2511.12609.
    """

    correction_bias: torch.Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        router_config: RouterConfig | None = None,
        num_weighed_experts: int = 0,
        initializer_range: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **router_options: Unpack[RouterOptions],
    ) -> None:
        super().__init__()
        check_positive(hidden_size=hidden_size, num_experts=num_experts)
        check_at_least_zero(num_weighed_experts=num_weighed_experts)
        config = config_with(type(self).__name__, router_config, router_options)
        if config.num_null_experts == 0:
            check_top_k(top_k, num_experts)
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.config = config
        self.num_weighed_experts = num_weighed_experts
        self.initializer_range = initializer_range
        self.weight = nn.Parameter(
            torch.empty(
                self.num_choices + num_weighed_experts, hidden_size, device=device, dtype=dtype
            )
        )
        # In 16-bit dtypes, update steps are rounded away once the bias reaches 0.5.
        wide: dict[str, Any] = {"device": device, "dtype": torch.float32}
        bias = torch.zeros(self.num_choices, **wide) if config.correction_bias else None
        self.register_buffer("correction_bias", bias)
        self.sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None
        # The operator checks that the options are compatible; call it with zero tokens.
        with torch.device("meta"):
            self._choose(torch.empty(0, self.num_choices), None)
        self.reset_parameters()

    @property
    def num_choices(self) -> int:
        """Number of experts to select from, including null experts: E + Z."""
        return self.num_experts + self.config.num_null_experts

    def reset_parameters(self) -> None:
        """Reinitialises the weight and zeroes the correction bias."""
        nn.init.normal_(self.weight, std=self.initializer_range)
        if self.correction_bias is not None:
            self.correction_bias.zero_()

    def __setattr__(self, name: str, value: Any) -> None:
        # load_state_dict(assign=True) and checkpoint loaders assign tensors like this.
        if name == "correction_bias" and isinstance(value, torch.Tensor):
            value = value.to(torch.float32)
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Casts and moves the router, as `.to` does; the correction bias is only moved."""
        bias_E = self.correction_bias
        super()._apply(fn, recurse)
        cast_E = self.correction_bias
        if bias_E is not None and cast_E is not None and cast_E.dtype != torch.float32:
            self.correction_bias = bias_E.to(cast_E.device)
        return self

    def forward(self, x: torch.Tensor, token_mask: torch.Tensor | None = None) -> RouterOutput:
        """Routes tokens.

        Args:
            x: `[..., D]`, dtype and device of the weight (under torch.autocast any of float32,
                bfloat16, float16). The leading dimensions are flattened to T tokens.
            token_mask: bool, the shape of x without its last dimension; tokens with False, such as
                padding, are excluded from both losses. They are still routed, unless experts have
                a capacity. None means all True.

        Returns:
            RouterOutput: scores `[T, K]`, ids `[T, K]` int32, tokens_per_expert `[E + Z]` int32,
            load_balancing_loss `()`, router_z_loss `()`, shared_scores `[T, S]` or None. With
            top_p the load-balancing loss counts only the choices kept; capacity does not affect it.

        Raises:
            ValueError: If the shape or device of x or the shape of token_mask is wrong.
            TypeError: If the dtype of x differs from that of the weight, or token_mask is not bool.
        """
        weight = weight_of(self, "weight")
        check_hidden(x, weight, self.hidden_size)
        mask_T = flatten_mask(token_mask, x)
        x_TD = x if x.dim() == 2 else x.reshape(-1, self.hidden_size)
        logits_TE, shared_TS = self._logits(x_TD, weight), None
        if self.num_weighed_experts > 0:
            logits_TE, shared_TS = logits_TE.tensor_split([self.num_choices], dim=1)
        routed = self._limit(self._choose(logits_TE, mask_T), logits_TE, mask_T)
        if shared_TS is not None:
            routed = self._weigh(routed, logits_TE, shared_TS)
        if self.config.router_dtype is not None:
            # The dtype that the experts require, whatever router_dtype is.
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            scores, shared = routed.scores.to(wide), routed.shared_scores
            shared = None if shared is None else shared.to(wide)
            routed = routed._replace(scores=scores, shared_scores=shared)
        return routed

    @torch.no_grad()
    def update_correction_bias(self, tokens_per_expert: torch.Tensor, rate: float = 1e-3) -> None:
        """Updates the correction bias by one step towards an even load, without an auxiliary loss.

        The bias of experts below the mean load increases by `rate`, that of experts above it
        decreases. Call this once per optimiser step, in training only.

        Args:
            tokens_per_expert: `[E + Z]`, the sum of those returned by all forwards of the step;
                under data parallelism, over all ranks.
            rate: step size.

        Raises:
            RuntimeError: If the router has no correction bias.
            ValueError: If tokens_per_expert has a wrong shape.

        Reference:
            Auxiliary-loss-free load balancing, arXiv 2408.15664.
        """
        if self.correction_bias is None:
            raise RuntimeError("the router has no correction_bias; construct it with one")
        if tokens_per_expert.shape != self.correction_bias.shape:
            raise ValueError(
                f"tokens_per_expert (shape {tuple(tokens_per_expert.shape)}) must have the shape "
                f"of correction_bias {tuple(self.correction_bias.shape)}"
            )
        load_E = tokens_per_expert.to(self.correction_bias)
        self.correction_bias += rate * torch.sign(load_E.mean() - load_E)

    def _logits(self, x_TD: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        dtype, jitter = self.config.router_dtype, self.config.jitter
        if dtype is not None:
            x_TD = x_TD.to(dtype)
        if self.training and jitter > 0:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - jitter, 1 + jitter)
        if dtype is None:
            return F.linear(x_TD, weight)
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD, weight.to(dtype))

    def _choose(self, logits_TE: torch.Tensor, mask_T: torch.Tensor | None) -> RouterOutput:
        config, bias_E = self.config, self._buffers["correction_bias"]
        chosen = topk_router(
            logits_TE,
            self.top_k,
            mode="softmax_topk" if config.is_sparsemixer else config.mode,
            correction_bias=None if bias_E is None else bias_E.to(logits_TE.device),
            num_groups=config.num_groups,
            top_groups=config.top_groups,
            scale=config.scale,
            token_mask=mask_T,
            balance=config.balance,
        )
        return RouterOutput(*chosen, None, config.num_null_experts)

    def _limit(
        self, routed: RouterOutput, logits_TE: torch.Tensor, mask_T: torch.Tensor | None
    ) -> RouterOutput:
        """Applies SparseMixer scores, top-p truncation and capacity, as configured."""
        config, scores_TK, ids_TK = self.config, routed.scores, routed.ids
        gives_up = config.top_p is not None or config.capacity_factor is not None
        if not gives_up and not config.is_sparsemixer and self.sum_over_ranks is None:
            return routed
        logits_TE = logits_TE.to(scores_TK.dtype)
        if config.is_sparsemixer:
            mixed_TK = sparsemixer_scores(logits_TE, ids_TK.long(), config.sparsemixer_eps)
            scores_TK = config.scale * self._renormalise(mixed_TK, 1.0)
        if config.top_p is not None:
            keep_TK = within_top_p(logits_TE, ids_TK.long(), config.top_p)
            ids_TK, scores_TK = self._give_up(ids_TK, scores_TK, keep_TK)
            scores_TK = self._renormalise(scores_TK, config.scale)
        routed = self._balance(routed, logits_TE, ids_TK, mask_T)
        if config.capacity_factor is not None:
            capacity = expert_capacity(
                ids_TK.numel(), self.num_experts, config.capacity_factor, config.min_capacity
            )
            total_T1 = scores_TK.sum(1, keepdim=True)
            keep_TK = within_capacity(ids_TK, self.num_experts, capacity, mask_T)
            ids_TK, scores_TK = self._give_up(ids_TK, scores_TK, keep_TK)
            if config.capacity_renorm:
                scores_TK = share(scores_TK) * total_T1
        if gives_up:
            tokens_per_expert = expert_sort(ids_TK, self.num_choices).tokens_per_expert
            routed = routed._replace(tokens_per_expert=tokens_per_expert)
        return routed._replace(scores=scores_TK, ids=ids_TK)

    def _balance(
        self,
        routed: RouterOutput,
        logits_TE: torch.Tensor,
        ids_TK: torch.Tensor,
        mask_T: torch.Tensor | None,
    ) -> RouterOutput:
        """Recomputes losses that the operator cannot compute: of kept choices or of all ranks."""
        config = self.config
        sum_over_ranks = self.sum_over_ranks if torch.is_grad_enabled() else None
        all_choices_kept = config.top_p is None or config.balance == "first"
        if sum_over_ranks is None and all_choices_kept:
            return routed
        ids_TK = ids_TK[:, :1] if config.balance == "first" else ids_TK
        balancing, z_loss = router_losses(
            logits_TE, ids_TK, mask_T, config.is_sigmoid, sum_over_ranks
        )
        if sum_over_ranks is None:
            z_loss = routed.router_z_loss
        return routed._replace(load_balancing_loss=balancing, router_z_loss=z_loss)

    def _give_up(
        self, ids_TK: torch.Tensor, scores_TK: torch.Tensor, keep_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return ids_TK.masked_fill(~keep_TK, self.num_choices), scores_TK.masked_fill(~keep_TK, 0)

    def _renormalise(self, scores_TK: torch.Tensor, total: float) -> torch.Tensor:
        return total * share(scores_TK) if self.config.renormalises else scores_TK

    def _weigh(
        self, routed: RouterOutput, logits_TE: torch.Tensor, shared_TS: torch.Tensor
    ) -> RouterOutput:
        """Adds scores of shared experts: one softmax over these and the choices kept."""
        dropped_TK = routed.is_dropped
        kept_TK = logits_TE.gather(1, routed.ids.long().masked_fill(dropped_TK, 0))
        union = torch.cat([kept_TK.masked_fill(dropped_TK, -torch.inf), shared_TS], dim=1)
        weights = union.to(routed.scores.dtype).softmax(1)
        chosen_TK, shared_TS = weights.split([kept_TK.shape[1], shared_TS.shape[1]], dim=1)
        scores = routed.scores * chosen_TK.sum(1, keepdim=True)
        return routed._replace(scores=scores, shared_scores=shared_TS)

    def extra_repr(self) -> str:
        """Returns the options shown by `print(module)`: those that differ from the defaults."""
        shown = {name: getattr(self, name) for name in ("hidden_size", "num_experts", "top_k")}
        shown |= {"mode": self.config.mode} | self.config.unusual()
        if self.num_weighed_experts:
            shown["num_weighed_experts"] = self.num_weighed_experts
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


for _name in RouterOptions.__annotations__.keys() - {"correction_bias"}:
    setattr(TopKRouter, _name, moved_to_config(_name))
