"""One mixture-of-experts layer with inputs, and the output that every provider must match."""

import copy

import torch
from torch import nn

from unimoe_kernels import MoE
from unimoe_kernels.testing import relative_error

from .candidates import Candidate, Work
from .shapes import COLD_TOKENS, LAYERS, Case

# Of the largest entry, as rounding in each dtype and sums over D and F give it, with room.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
CACHED_BYTES = 1 << 27
"""Four times the size of a typical L3 cache."""
EVEN = 8.0
"""Logit of a forced choice: far larger than normal logits, but small enough not to magnify rounding
errors."""


MOST_COPIES = 32
"""Of a layer, so that one of a few kilobytes, which is not timed, is made in a moment."""


def problems_of(case: Case, device: torch.device, dtype: torch.dtype) -> list["Problem"]:
    """Returns the problems that calls of a case cycle through: one problem, or copies of it.

    With a few tokens, reading their experts' weights dominates, and in a model other layers run in
    between. There are enough copies for each to have left every cache before it is used again.
    """
    first = Problem(case, device, dtype)
    if case.tokens > COLD_TOKENS:
        return [first]
    copies = min(MOST_COPIES, int(CACHED_BYTES / first.work.bytes))
    return [first, *(copy.deepcopy(first) for _ in range(copies))]


class Problem:
    """Weights, inputs and reference outputs of a case.

    Routing is `natural` (normal logits), `uniform` (token t selects experts tK, tK+1, ... modulo
    E), `zipf` (expert e is preferred by `-log(e + 1)`) or `same` (all tokens select experts 0 to
    K-1).

    Attributes:
        case: the case.
        layer: its sizes.
        moe: the layer; providers share the memory of its weights.
        x: `[1, T, D]`.
        grad: `[1, T, D]`, gradient of the output. Zero for tokens whose K-th and next choice are
            closer than the rounding of the dtype, because two correct layers may differ there.
        clear: `[T]`, bool, all other tokens.
        work: work of a call in the case's mode.
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
            self._route(case.routing)
        self._expected, ids_TK, self.clear = self._reference()
        self.grad[0, ~self.clear] = 0
        self.work = self._work(ids_TK)

    @torch.no_grad()
    def _route(self, routing: str) -> None:
        """Makes features of x and columns of the router decide, where routing is no accident."""
        _, _, E, K = self.layer
        x_TD, router_ED = self.x[0], self.moe.router.weight
        if routing == "uniform":
            token_T = torch.arange(len(x_TD), device=x_TD.device)
            ids_TK = (token_T[:, None] * K + torch.arange(K, device=x_TD.device)) % E
            x_TD[:, :E] = torch.zeros(len(x_TD), E, device=x_TD.device).scatter_(1, ids_TK, 1)
            router_ED[:, :E] = EVEN * torch.eye(E, device=x_TD.device)
            return
        rank_E = torch.arange(E, dtype=torch.float32)
        popularity_E = {
            "natural": torch.zeros(E),
            "zipf": -torch.log(rank_E + 1),
            "same": torch.where(rank_E < K, EVEN, 0.0),
        }[routing]
        x_TD[:, 0] = 1
        router_ED[:, 0] = popularity_E.to(router_ED)

    def candidate(self, name: str, layer: nn.Module, comparable: bool = True) -> Candidate:
        """The layer, timed in the case's mode and checked against the reference.

        Args:
            name: for the message of a failed check.
            layer: maps `[1, T, D]` to `[1, T, D]`.
            comparable: False for a layer that computes something else.
        """
        training = self.case.mode == "training"
        return Candidate(
            run=lambda: self._training(layer) if training else self._forward(layer),
            check=(lambda: self._check(name, layer)) if comparable else None,
            forward=(lambda: layer(self.x.detach().requires_grad_())) if training else None,
            weights=tuple(layer.parameters()),
        )

    def check_output(self, name: str, output: torch.Tensor) -> None:
        """Raises AssertionError unless output `[1, T, D]` is the reference's."""
        self._compare(name, {"output": output[0, self.clear].detach()})

    def _check(self, name: str, layer: nn.Module) -> None:
        x = self.x.detach().requires_grad_()
        y = layer(x)
        answers = {"output": y[0, self.clear].detach()}
        if self.case.mode == "training":
            layer.zero_grad(set_to_none=True)
            y.backward(self.grad)
            router = getattr(layer, "router", None) or layer.gate
            answers |= {"gradient of x": x.grad, "gradient of the router": router.weight.grad}
            layer.zero_grad(set_to_none=True)
        self._compare(name, answers)

    def _compare(self, name: str, answers: dict[str, torch.Tensor]) -> None:
        limit = TOLERANCE[self.x.dtype]
        for what, actual in answers.items():
            error = relative_error(actual, self._expected[what])
            assert error < limit, f"{name}: {what} has relative error {error:.2g}, limit {limit}"

    def _forward(self, layer: nn.Module) -> None:
        with torch.no_grad():
            layer(self.x)

    def _training(self, layer: nn.Module) -> None:
        x = self.x.detach().requires_grad_()
        layer.zero_grad(set_to_none=True)
        layer(x).backward(self.grad)

    def _work(self, ids_TK: torch.Tensor) -> Work:
        D, F, E, K = self.layer
        T, size = self.case.tokens, self.x.element_size()
        passes = 3 if self.case.mode == "training" else 1
        flops = passes * T * (6 * K * D * F + 2 * D * E)
        # Weights of experts with rows are read once per pass; gradients are written once.
        weights = size * 3 * D * F * ids_TK.unique().numel()
        return Work(flops, passes * (weights + 2 * size * T * D))

    def _reference(self) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Output, gradients, choices and clear tokens in higher precision, expert by expert.

        One expert at a time is held in the higher precision, so that large layers fit.
        """
        wide = torch.float64 if self.x.dtype == torch.float32 else torch.float32
        K, experts = self.layer.K, self.moe.experts
        x_TD = self.x[0].to(wide).requires_grad_()
        router_ED = self.moe.router.weight.detach().to(wide).requires_grad_()
        logits_TE = x_TD @ router_ED.T
        chosen_TK, ids_TK = logits_TE.topk(K)
        scores_TK = chosen_TK.softmax(-1)
        clear_T = _has_margin(logits_TE.detach(), K, self.x.dtype)
        grad_TD = self.grad[0].to(wide) * clear_T[:, None]
        y_TD = torch.zeros_like(x_TD, requires_grad=False)
        grad_x_TD, grad_scores_TK = torch.zeros_like(y_TD), torch.zeros_like(scores_TK)
        for expert in range(self.layer.E):
            token, choice = torch.where(ids_TK == expert)
            if not len(token):
                continue
            rows = x_TD.detach()[token].requires_grad_()
            gate, up = (rows @ experts.gate_up_proj[expert].detach().to(wide).T).chunk(2, dim=-1)
            down = (nn.functional.silu(gate) * up) @ experts.down_proj[expert].detach().to(wide).T
            score = scores_TK.detach()[token, choice, None]
            y_TD.index_add_(0, token, score * down.detach())
            if self.case.mode == "training":
                (grad_rows,) = torch.autograd.grad(down, rows, score * grad_TD[token])
                grad_x_TD.index_add_(0, token, grad_rows)
                grad_scores_TK[token, choice] = (grad_TD[token] * down.detach()).sum(-1)
        expected = {"output": y_TD[clear_T]}
        if self.case.mode == "training":
            scores_TK.backward(grad_scores_TK)
            expected |= {
                "gradient of x": (x_TD.grad + grad_x_TD)[None],
                "gradient of the router": router_ED.grad,
            }
        return expected, ids_TK, clear_T


def _has_margin(logits_TE: torch.Tensor, top_k: int, dtype: torch.dtype) -> torch.Tensor:
    if top_k == logits_TE.shape[1]:
        return torch.ones(logits_TE.shape[0], dtype=torch.bool, device=logits_TE.device)
    best = logits_TE.topk(top_k + 1).values
    gap_T = best[:, top_k - 1] - best[:, top_k]
    return gap_T > 4 * torch.finfo(dtype).eps * logits_TE.abs().amax(1)
