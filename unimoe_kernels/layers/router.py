"""The learned router: one bias-free projection and the top-k operator."""

import torch
import torch.nn.functional as F
from torch import nn

from unimoe_kernels.layers._inputs import check_hidden, check_positive, check_top_k, flatten_mask
from unimoe_kernels.ops import RouterOutput, topk_router


class TopKRouter(nn.Module):
    """Chooses `top_k` of `num_experts` experts for every token.

    `logits = x @ weight.T` in the dtype of the layer, then `topk_router`, which works in float32
    (float64 for float64 inputs) and breaks ties towards the lower expert.

    Attributes:
        weight: `[E, D]` parameter, normal with standard deviation `initializer_range`.
        correction_bias: `[E]` float32 buffer of zeros, or None. It takes part in the choice of
            experts and never in their scores; whoever balances load by it changes it in place.

    Args:
        hidden_size: D.
        num_experts: E, at least 1.
        top_k: K, between 1 and E.
        mode: `"topk_softmax"` (Uni-MoE, Mixtral), `"softmax_topk"`, `"softmax_topk_renorm"`,
            `"sigmoid"` or `"sigmoid_renorm"` (DeepSeek-V3); see `topk_router`.
        correction_bias: whether to hold the buffer of that name; for the sigmoid modes.
        num_groups: groups that experts are split into for the group-limited choice.
        top_groups: groups a token may choose from.
        scale: factor on the scores.
        balance: `"all"` counts all K choices in the load-balancing loss, `"first"` the first one.
        initializer_range: standard deviation of the initial weight, 0.02 as in LLaMA.
        device: device of the weight.
        dtype: dtype of the weight.

    Raises:
        ValueError: if a size is below 1, top_k is above num_experts, or `topk_router` refuses the
            mode, groups or balance.
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
        initializer_range: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(hidden_size=hidden_size)
        check_top_k(top_k, num_experts)
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.mode = mode
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.scale = scale
        self.balance = balance
        self.initializer_range = initializer_range
        self.weight = nn.Parameter(
            torch.empty(num_experts, hidden_size, device=device, dtype=dtype)
        )
        bias_E = torch.zeros(num_experts, device=device) if correction_bias else None
        self.register_buffer("correction_bias", bias_E)
        # The operator itself refuses options that do not go together, here on no tokens.
        with torch.device("meta"):
            self._route(torch.empty(0, num_experts), None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weight anew and zeroes the correction bias."""
        nn.init.normal_(self.weight, std=self.initializer_range)
        if self.correction_bias is not None:
            self.correction_bias.zero_()

    def forward(self, x: torch.Tensor, token_mask: torch.Tensor | None = None) -> RouterOutput:
        """Routes tokens.

        Args:
            x: `[..., D]`, dtype and device of the weight (under torch.autocast any of float32,
                bfloat16, float16). The leading dimensions are flattened to T tokens.
            token_mask: the shape of x without its last dimension, bool; False marks tokens, such
                as padding, that both losses and `tokens_per_expert` statistics of the losses leave
                out. They are still routed. None means all True.

        Returns:
            RouterOutput: scores `[T, K]`, ids `[T, K]` int32, tokens_per_expert `[E]` int32,
            load_balancing_loss `()`, router_z_loss `()`.

        Raises:
            ValueError: if the shape or device of x, or the shape of token_mask is wrong.
            TypeError: if x has another dtype than the weight, or token_mask is not bool.
        """
        check_hidden(x, self.weight, self.hidden_size)
        mask_T = flatten_mask(token_mask, x)
        logits_TE = F.linear(x.reshape(-1, self.hidden_size), self.weight)
        return self._route(logits_TE, mask_T)

    def _route(self, logits_TE: torch.Tensor, mask_T: torch.Tensor | None) -> RouterOutput:
        bias_E = self.correction_bias
        return topk_router(
            logits_TE,
            self.top_k,
            mode=self.mode,
            correction_bias=None if bias_E is None else bias_E.to(logits_TE.device),
            num_groups=self.num_groups,
            top_groups=self.top_groups,
            scale=self.scale,
            token_mask=mask_T,
            balance=self.balance,
        )

    def extra_repr(self) -> str:
        """What print(module) shows between the parentheses."""
        return (
            f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, "
            f"top_k={self.top_k}, mode={self.mode!r}"
        )
