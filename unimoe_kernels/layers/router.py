"""The learned router: one bias-free projection, the top-k operator, and limits on its choice."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from unimoe_kernels.layers._inputs import (
    check_at_least_zero,
    check_hidden,
    check_positive,
    check_top_k,
    flatten_mask,
)
from unimoe_kernels.layers.choice import (
    expert_capacity,
    load_balancing_loss,
    shares_of_losses,
    sparsemixer_scores,
    within_capacity,
    within_top_p,
)
from unimoe_kernels.ops import RouterOutput, expert_sort, topk_router

_SPARSEMIXER = ("sparsemixer", "sparsemixer_renorm")
# Scores of a token add up to `scale`, and do so again after some choices are given up.
_RENORMALISED = ("topk_softmax", "softmax_topk_renorm", "sigmoid_renorm", "sparsemixer_renorm")


class TopKRouter(nn.Module):
    """Chooses up to `top_k` of `num_experts` experts for every token.

    `logits = x @ weight.T`, then `topk_router`, which works in float32 (float64 for float64 inputs)
    and breaks ties towards the lower expert. Ids say who answers:

    ==============================  ==============================================================
    id                              stands for
    ==============================  ==============================================================
    0 to E - 1                      the experts
    E to E + Z - 1                  null experts: chosen like all others, and answer zero
    then S                          shared experts that the router weighs, in the last S columns
    E + Z + S                       nobody: a choice given up for `top_p` or want of room
    ==============================  ==============================================================

    All of E and more are skipped by `GroupedExperts` and `moe_mlp`.

    Attributes:
        weight: `[E + Z + S, D]` parameter, normal with standard deviation `initializer_range`.
        correction_bias: `[E + Z]` buffer of zeros, or None. It stays float32, whatever the layer is
            cast to. It takes part in the choice of experts and never in their scores;
            `update_correction_bias` balances load by it.
        sum_over_ranks: None, or a function that adds up a tensor of counts over all ranks that
            share a batch (`unimoe_kernels.distributed`). Where gradients are recorded, both losses
            are then this rank's share of the losses of all tokens: the shares add up to them, and
            so do their gradients.

    Args:
        hidden_size: D.
        num_experts: E, at least 1.
        top_k: K, between 1 and E + Z.
        mode: `"topk_softmax"` (Uni-MoE, Mixtral), `"softmax_topk"`, `"softmax_topk_renorm"`,
            `"sigmoid"` or `"sigmoid_renorm"` (DeepSeek-V3); see `topk_router`. Or `"sparsemixer"`
            (Phi-3.5-MoE; not the sampling of its training) and `"sparsemixer_renorm"` (DCMoE).
        correction_bias: whether to hold the buffer of that name; not for `"topk_softmax"` and the
            sparsemixer modes.
        num_groups: groups that experts are split into for the group-limited choice.
        top_groups: groups a token may choose from.
        scale: factor on the scores.
        balance: `"all"` counts all K choices in the load-balancing loss, `"first"` the first one.
        num_null_experts: Z. A token that chooses one takes fewer real experts.
        num_weighed_experts: S, shared experts that every token goes to. Their scores and those of
            the choice come from one softmax, in which the choice keeps its inner proportions.
        top_p: a token gives up all choices beyond those that hold this much of the softmax
            probability together, so that K is only the most it takes. None keeps all. Not for the
            sigmoid modes.
        capacity_factor: an expert answers at most `max(ceil(K * T / E * capacity_factor),
            min_capacity)` rows; first choices find room before second ones. Tokens that token_mask
            leaves out find none. None is dropless.
        min_capacity: see there.
        capacity_renorm: whether the choices that found room take over the scores of the others.
        jitter: in training, the router reads x times a uniform factor from `1 - jitter` to
            `1 + jitter`. The experts do not.
        sparsemixer_eps: see `sparsemixer_scores`.
        router_dtype: dtype of the projection, whatever x, the weight and torch.autocast have, such
            as torch.float32 or its name. None is the dtype of the layer.
        initializer_range: standard deviation of the initial weight, 0.02 as in LLaMA.
        device: device of the weight.
        dtype: dtype of the weight.

    Raises:
        ValueError: if a size is below 1, an option out of its range, top_k above the number of
            experts, or `topk_router` refuses the mode, groups or balance.

    Reference:
        Null experts, top_p and weighed shared experts: Uni-MoE-2.0, arXiv 2511.12609. Capacity:
        GShard, arXiv 2006.16668. Jitter: Switch Transformers, arXiv 2101.03961.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        mode: str = "topk_softmax",
        correction_bias: bool = False,
        num_groups: int = 1,
        top_groups: int = 1,
        scale: float = 1.0,
        balance: str = "all",
        num_null_experts: int = 0,
        num_weighed_experts: int = 0,
        top_p: float | None = None,
        capacity_factor: float | None = None,
        min_capacity: int = 4,
        capacity_renorm: bool = False,
        jitter: float = 0.0,
        sparsemixer_eps: float = 0.01,
        router_dtype: torch.dtype | str | None = None,
        initializer_range: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(hidden_size=hidden_size, num_experts=num_experts)
        check_at_least_zero(
            num_null_experts=num_null_experts,
            num_weighed_experts=num_weighed_experts,
            min_capacity=min_capacity,
            jitter=jitter,
            sparsemixer_eps=sparsemixer_eps,
        )
        if num_null_experts == 0:
            check_top_k(top_k, num_experts)
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p ({top_p}) must be above 0 and at most 1")
        if top_p is not None and mode.startswith("sigmoid"):
            raise ValueError(f"mode ({mode!r}) must be one with a softmax for top_p ({top_p})")
        if capacity_factor is not None and not capacity_factor > 0:
            raise ValueError(f"capacity_factor ({capacity_factor}) must be above 0")
        if mode in _SPARSEMIXER and correction_bias:
            raise ValueError(f"mode ({mode!r}) must be another one with a correction_bias")
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.mode = mode
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.scale = scale
        self.balance = balance
        self.num_null_experts = num_null_experts
        self.num_weighed_experts = num_weighed_experts
        self.top_p = top_p
        self.capacity_factor = capacity_factor
        self.min_capacity = min_capacity
        self.capacity_renorm = capacity_renorm
        self.jitter = jitter
        self.sparsemixer_eps = sparsemixer_eps
        self.router_dtype = _floating_dtype(router_dtype)
        self.initializer_range = initializer_range
        self.weight = nn.Parameter(
            torch.empty(
                self.num_choices + num_weighed_experts, hidden_size, device=device, dtype=dtype
            )
        )
        # In 16 bits steps of an update are lost from 0.5 on.
        wide = {"device": device, "dtype": torch.float32}
        bias = torch.zeros(self.num_choices, **wide) if correction_bias else None
        self.register_buffer("correction_bias", bias)
        self.sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None
        # The operator itself refuses options that do not go together, here on no tokens.
        with torch.device("meta"):
            self._choose(torch.empty(0, self.num_choices), None)
        self.reset_parameters()

    @property
    def num_choices(self) -> int:
        """E + Z: how many experts, null ones included, take part in the choice."""
        return self.num_experts + self.num_null_experts

    def reset_parameters(self) -> None:
        """Draws the weight anew and zeroes the correction bias."""
        nn.init.normal_(self.weight, std=self.initializer_range)
        if self.correction_bias is not None:
            self.correction_bias.zero_()

    def __setattr__(self, name: str, value: object) -> None:
        # What load_state_dict(assign=True) and loaders of checkpoints do.
        if name == "correction_bias" and isinstance(value, torch.Tensor):
            value = value.to(torch.float32)
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Casts and moves the router, as `.to` does; the correction bias is moved only."""
        bias_E = self.correction_bias
        super()._apply(fn, recurse)
        if bias_E is not None and self.correction_bias.dtype != torch.float32:
            self.correction_bias = bias_E.to(self.correction_bias.device)
        return self

    def forward(self, x: torch.Tensor, token_mask: torch.Tensor | None = None) -> RouterOutput:
        """Routes tokens.

        Args:
            x: `[..., D]`, dtype and device of the weight (under torch.autocast any of float32,
                bfloat16, float16). The leading dimensions are flattened to T tokens.
            token_mask: the shape of x without its last dimension, bool; False marks tokens, such
                as padding, that both losses leave out. They are still routed, unless experts have
                a capacity. None means all True.

        Returns:
            RouterOutput: scores `[T, K + S]`, ids `[T, K + S]` int32, tokens_per_expert `[E + Z]`
            int32, load_balancing_loss `()`, router_z_loss `()`. With top_p the load-balancing
            loss counts the choices kept; room plays no part in it.

        Raises:
            ValueError: if the shape or device of x, or the shape of token_mask is wrong.
            TypeError: if x has another dtype than the weight, or token_mask is not bool.
        """
        check_hidden(x, self.weight, self.hidden_size)
        mask_T = flatten_mask(token_mask, x)
        logits_TE, shared_TS = self._logits(x.reshape(-1, self.hidden_size)), None
        if self.num_weighed_experts > 0:
            logits_TE, shared_TS = logits_TE.tensor_split([self.num_choices], dim=1)
        routed = self._limit(self._choose(logits_TE, mask_T), logits_TE, mask_T)
        if shared_TS is not None:
            routed = self._weigh(routed, logits_TE, shared_TS)
        if self.router_dtype is not None:
            # What the experts take, be router_dtype wider or narrower than they are.
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            routed = routed._replace(scores=routed.scores.to(wide))
        return routed

    @torch.no_grad()
    def update_correction_bias(self, tokens_per_expert: torch.Tensor, rate: float = 1e-3) -> None:
        """Moves the correction bias by one step towards even load, without any auxiliary loss.

        Experts with less than the mean load rise by `rate`, those with more fall by it. Call it
        once an optimiser step, after training steps only.

        Args:
            tokens_per_expert: `[E + Z]`, what forwards of this step returned, added up; under data
                parallelism over all ranks.
            rate: step of the bias.

        Raises:
            RuntimeError: if the router has no correction bias.
            ValueError: if tokens_per_expert has another shape.

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

    def _logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        if self.router_dtype is not None:
            x_TD = x_TD.to(self.router_dtype)
        if self.training and self.jitter > 0:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
        if self.router_dtype is None:
            return F.linear(x_TD, self.weight)
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD, self.weight.to(self.router_dtype))

    def _choose(self, logits_TE: torch.Tensor, mask_T: torch.Tensor | None) -> RouterOutput:
        bias_E = self.correction_bias
        return topk_router(
            logits_TE,
            self.top_k,
            mode="softmax_topk" if self.mode in _SPARSEMIXER else self.mode,
            correction_bias=None if bias_E is None else bias_E.to(logits_TE.device),
            num_groups=self.num_groups,
            top_groups=self.top_groups,
            scale=self.scale,
            token_mask=mask_T,
            balance=self.balance,
        )

    def _limit(
        self, routed: RouterOutput, logits_TE: torch.Tensor, mask_T: torch.Tensor | None
    ) -> RouterOutput:
        """Other scores where the mode asks for them, and choices given up."""
        scores_TK, ids_TK, tokens_per_expert, balancing, z_loss = routed
        if self.mode in _SPARSEMIXER:
            mixed_TK = sparsemixer_scores(
                logits_TE.to(scores_TK.dtype), ids_TK.long(), self.sparsemixer_eps
            )
            scores_TK = self.scale * self._renormalise(mixed_TK, 1.0)
        if self.top_p is not None:
            wide_TE = logits_TE.to(scores_TK.dtype)
            keep_TK = within_top_p(wide_TE, ids_TK.long(), self.top_p)
            ids_TK, scores_TK = self._give_up(ids_TK, scores_TK, keep_TK)
            scores_TK = self._renormalise(scores_TK, self.scale)
            if self.balance == "all":
                balancing = load_balancing_loss(wide_TE, ids_TK, mask_T)
        if self.sum_over_ranks is not None and torch.is_grad_enabled():
            balancing, z_loss = shares_of_losses(
                logits_TE.to(scores_TK.dtype),
                ids_TK[:, :1] if self.balance == "first" else ids_TK,
                mask_T,
                self.mode.startswith("sigmoid"),
                self.sum_over_ranks,
            )
        if self.capacity_factor is not None:
            capacity = expert_capacity(
                ids_TK.numel(), self.num_experts, self.capacity_factor, self.min_capacity
            )
            total_T1 = scores_TK.sum(1, keepdim=True)
            keep_TK = within_capacity(ids_TK, self.num_experts, capacity, mask_T)
            ids_TK, scores_TK = self._give_up(ids_TK, scores_TK, keep_TK)
            if self.capacity_renorm:
                scores_TK = _share(scores_TK) * total_T1
        if self.top_p is not None or self.capacity_factor is not None:
            tokens_per_expert = expert_sort(ids_TK, self.num_choices).tokens_per_expert
        return RouterOutput(scores_TK, ids_TK, tokens_per_expert, balancing, z_loss)

    def _give_up(
        self, ids_TK: torch.Tensor, scores_TK: torch.Tensor, keep_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        nobody = self.num_choices + self.num_weighed_experts
        return ids_TK.masked_fill(~keep_TK, nobody), scores_TK.masked_fill(~keep_TK, 0)

    def _renormalise(self, scores_TK: torch.Tensor, total: float) -> torch.Tensor:
        return total * _share(scores_TK) if self.mode in _RENORMALISED else scores_TK

    def _weigh(
        self, routed: RouterOutput, logits_TE: torch.Tensor, shared_TS: torch.Tensor
    ) -> RouterOutput:
        """Adds the shared experts: one softmax over the choices kept and them."""
        scores_TK, ids_TK = routed.scores, routed.ids
        num_shared = self.num_weighed_experts
        shared_ids_S = self.num_choices + torch.arange(
            num_shared, dtype=ids_TK.dtype, device=ids_TK.device
        )
        given_up_TK = ids_TK >= self.num_choices
        kept_TK = logits_TE.gather(1, ids_TK.long().masked_fill(given_up_TK, 0))
        union = torch.cat([kept_TK.masked_fill(given_up_TK, -torch.inf), shared_TS], dim=1)
        weights = union.to(scores_TK.dtype).softmax(1)
        chosen_TK, shared_TS = weights.split([ids_TK.shape[1], num_shared], dim=1)
        scores = torch.cat([scores_TK * chosen_TK.sum(1, keepdim=True), shared_TS], dim=1)
        ids = torch.cat([ids_TK, shared_ids_S.expand(ids_TK.shape[0], -1)], dim=1)
        return routed._replace(scores=scores, ids=ids)

    def extra_repr(self) -> str:
        """What print(module) shows between the parentheses: options that differ from the usual."""
        shown = ["hidden_size", "num_experts", "top_k", "mode"]
        shown += [name for name, usual in _USUAL.items() if getattr(self, name) != usual]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)


def _floating_dtype(router_dtype: torch.dtype | str | None) -> torch.dtype | None:
    dtype = getattr(torch, router_dtype, None) if isinstance(router_dtype, str) else router_dtype
    if router_dtype is not None and not getattr(dtype, "is_floating_point", False):
        raise ValueError(f"router_dtype ({router_dtype}) must be a floating point dtype")
    return dtype


def _share(scores_TK: torch.Tensor) -> torch.Tensor:
    """Scores over their sum; a token without any keeps zeros."""
    sum_T1 = scores_TK.sum(1, keepdim=True)
    return scores_TK / sum_T1.masked_fill(sum_T1 == 0, 1)


_USUAL = {
    "num_groups": 1,
    "scale": 1.0,
    "num_null_experts": 0,
    "num_weighed_experts": 0,
    "top_p": None,
    "capacity_factor": None,
    "jitter": 0.0,
    "router_dtype": None,
}
