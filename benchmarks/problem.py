"""One mixture-of-experts layer with inputs, and the answer every provider has to give."""

import torch

from unimoe_kernels import LoopedMoE, MoE
from unimoe_kernels.testing import relative_error

from .shapes import LAYERS, Case

# Of the largest entry, as rounding in each dtype and sums over D and F give it, with room.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


class Problem:
    """Weights, inputs and reference answers of a case.

    Attributes:
        case: the case.
        layer: its sizes.
        moe: the layer; providers share the memory of its weights.
        x: `[1, T, D]`.
        grad: `[1, T, D]`, gradient of the output. Zero for tokens whose K-th and next choice are
            nearer than the rounding of the dtype, because there two right layers may differ.
        clear: `[T]`, bool, the tokens that are not so.
    """

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        self.case = case
        self.layer = D, F, E, K = LAYERS[case.layer]
        torch.manual_seed(0)
        self.moe = MoE(D, F, E, K, device=device, dtype=dtype)
        with torch.no_grad():
            for weight in self.moe.parameters():
                weight.normal_(std=weight.shape[-1] ** -0.5)
            self.x = torch.randn(1, case.tokens, D, device=device, dtype=dtype)
            self.grad = torch.randn_like(self.x)
            # A constant feature gives every expert a fixed part of its logit.
            self.x[..., 0] = 1
            self.moe.router.weight[:, 0] = _popularity(case.routing, E, K).to(self.x)
            wide = LoopedMoE.from_moe(self.moe).to(_wider(dtype))
            logits_TE = wide.gate(self.x[0].to(wide.gate.weight.dtype))
            self.clear = _has_margin(logits_TE, K, dtype)
            self.grad[0, ~self.clear] = 0
        self._expected = self._answers(wide)

    def check(self, name: str, layer: torch.nn.Module) -> None:
        """Raises AssertionError unless layer gives the reference's output and gradients."""
        for what, actual in self._answers(layer).items():
            error = relative_error(actual, self._expected[what].to(actual.dtype))
            limit = TOLERANCE[self.x.dtype]
            assert error < limit, f"{name}: {what} has relative error {error:.2g}, limit {limit}"

    def forward(self, layer: torch.nn.Module) -> None:
        """What mode "forward" times."""
        with torch.no_grad():
            layer(self.x)

    def training(self, layer: torch.nn.Module) -> None:
        """What mode "training" times: forward, and gradients of x and all weights."""
        x = self.x.detach().requires_grad_()
        layer.zero_grad(set_to_none=True)
        layer(x).backward(self.grad)

    def _answers(self, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
        dtype = next(layer.parameters()).dtype
        x = self.x.detach().to(dtype).requires_grad_()
        y = layer(x)
        answers = {"output": y[0, self.clear].detach()}
        if self.case.mode == "training":
            layer.zero_grad(set_to_none=True)
            y.backward(self.grad.to(dtype))
            answers["gradient of x"] = x.grad
            router = getattr(layer, "router", None) or layer.gate
            answers["gradient of the router"] = router.weight.grad
            layer.zero_grad(set_to_none=True)
        return answers


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else torch.float32


def _has_margin(logits_TE: torch.Tensor, top_k: int, dtype: torch.dtype) -> torch.Tensor:
    if top_k == logits_TE.shape[1]:
        return torch.ones(logits_TE.shape[0], dtype=torch.bool, device=logits_TE.device)
    best = logits_TE.topk(top_k + 1).values
    gap_T = best[:, top_k - 1] - best[:, top_k]
    return gap_T > 4 * torch.finfo(dtype).eps * logits_TE.abs().amax(1)


def _popularity(routing: str, num_experts: int, top_k: int) -> torch.Tensor:
    """Added to the logits, which are normal with deviation 1 without it."""
    rank_E = torch.arange(num_experts, dtype=torch.float32)
    if routing == "zipf":
        return -torch.log(rank_E + 1)
    if routing == "same":
        # Far beyond what normal logits reach, yet small enough not to magnify rounding.
        return torch.where(rank_E < top_k, 8.0, 0.0)
    return torch.zeros(num_experts)
