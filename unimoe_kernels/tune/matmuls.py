"""The matmuls of a layer on random inputs, with their launches and exact results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unimoe_kernels._triton.problem import Tile
from unimoe_kernels.ops.expert_sort import kernel as expert_sort
from unimoe_kernels.ops.grouped_mm import kernel as grouped_mm
from unimoe_kernels.ops.moe_mlp import kernel, kernel_backward
from unimoe_kernels.testing import sample_routing
from unimoe_kernels.tune.cases import Case

GATE = ("silu", 7.0, 1.702)


class Matmul(ABC):
    """One matmul with its inputs; outputs are of order one.

    Subclasses have `launch`, which returns the outputs, `part`, which selects the part of the
    outputs of an expert, and `exact`, which computes this part in at least float32 without Triton.
    """

    def __init__(self, case: Case, device: torch.device):
        self.case = case
        self.dtype = case.problem.dtype
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0)
        d, f, experts, self.top_k = case.shape
        self.width, self.expert_width, self.experts = d, f, experts
        ids, scores = sample_routing("uniform", case.tokens, self.top_k, experts, device=device)
        self.scores = scores if self.dtype != torch.float64 else scores.double()
        sort = expert_sort.expert_sort(ids.view(-1), experts)
        self.row_order, self.offsets = sort[0], sort[3]
        self.tokens, self.rows = case.tokens, case.tokens * self.top_k
        self.prepare()

    @abstractmethod
    def prepare(self) -> None:
        """Draws the inputs."""

    @abstractmethod
    def launch(self, tile: Tile) -> tuple[Tensor, ...]:
        """Runs the kernel with a tile."""

    def part(self, outputs: tuple[Tensor, ...], own: Expert) -> tuple[Tensor, ...]:
        """Selects an expert's rows of every output."""
        return tuple(output[own.begin : own.end] for output in outputs)

    @abstractmethod
    def exact(self, own: Expert) -> tuple[Tensor, ...]:
        """Computes the expected value of `part`."""

    def some_experts(self) -> list[Expert]:
        """Returns the first and the last expert with rows."""
        bounds = self.offsets.tolist()
        found = [
            Expert(e, begin, end, (self.row_order[begin:end] // self.top_k).long())
            for e, (begin, end) in enumerate(pairwise(bounds))
            if end > begin
        ]
        return [found[0], found[-1]]

    def draw(self, *size: int, by: float = 1.0) -> Tensor:
        """Draws normal values with standard deviation `by`."""
        numbers = torch.empty(size, dtype=self.dtype, device=self.device)
        return numbers.normal_(0, by, generator=self.generator)

    def wide(self, *tensors: Tensor) -> list[Tensor]:
        """Casts tensors to float32, except float64 ones."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return [tensor.to(dtype) for tensor in tensors]


class Expert(NamedTuple):
    """An expert, its first row, its end, and the tokens of its rows."""

    index: int
    begin: int
    end: int
    tokens: Tensor


class GateUp(Matmul):
    """`act(W1 x)` of gathered rows, and the pre-activations."""

    def prepare(self) -> None:
        """See `Matmul`."""
        self.x = self.draw(self.tokens, self.width)
        size = (self.experts, 2 * self.expert_width, self.width)
        self.weight = self.draw(*size, by=self.width**-0.5)

    def launch(self, tile: Tile) -> tuple[Tensor, ...]:
        """See `Matmul`."""
        return kernel.gated(
            self.x,
            self.weight,
            None,
            self.offsets,
            self.row_order,
            self.top_k,
            GATE,
            True,
            tile=tile,
        )

    def exact(self, own: Expert) -> tuple[Tensor, ...]:
        """See `Matmul`."""
        x, weight = self.wide(self.x[own.tokens], self.weight[own.index])
        hidden = x @ weight.t()
        gate, up = hidden.chunk(2, dim=1)
        return F.silu(gate) * up, hidden


class Rows(Matmul):
    """Rows times weights: `"down"`, or `"grad_x"` on a transposed view."""

    def prepare(self) -> None:
        """See `Matmul`."""
        inner = self.case.problem.inner
        self.x = self.draw(self.rows, inner)
        transposed = self.case.name == "grad_x"
        size = (inner, self.width) if transposed else (self.width, inner)
        weight = self.draw(self.experts, *size, by=inner**-0.5)
        self.weight = weight.transpose(1, 2) if transposed else weight

    def launch(self, tile: Tile) -> tuple[Tensor, ...]:
        """See `Matmul`."""
        y = grouped_mm.grouped_mm(self.x, self.weight, self.offsets, None, tail=False, tile=tile)
        return (y,)

    def exact(self, own: Expert) -> tuple[Tensor, ...]:
        """See `Matmul`."""
        x, weight = self.wide(self.x[own.begin : own.end], self.weight[own.index])
        return (x @ weight.t(),)


class GatedBackward(Matmul):
    """Gradients of scores and pre-activations, and the activations times score."""

    def prepare(self) -> None:
        """See `Matmul`."""
        self.grad = self.draw(self.tokens, self.width)
        size = (self.experts, self.width, self.expert_width)
        self.weight = self.draw(*size, by=self.width**-0.5)
        self.hidden = self.draw(self.rows, 2 * self.expert_width)

    def launch(self, tile: Tile) -> tuple[Tensor, ...]:
        """See `Matmul`."""
        return kernel_backward.gated_backward(
            self.grad,
            self.weight,
            None,
            self.scores,
            self.hidden,
            self.offsets,
            self.row_order,
            GATE,
            True,
            True,
            True,
            tile=tile,
        )

    def part(self, outputs: tuple[Tensor, ...], own: Expert) -> tuple[Tensor, ...]:
        """See `Matmul`."""
        grad_scores, *rest = outputs
        routed = self.row_order[own.begin : own.end].long()
        return grad_scores.view(-1)[routed], *super().part(tuple(rest), own)

    def exact(self, own: Expert) -> tuple[Tensor, ...]:
        """See `Matmul`."""
        routed = self.row_order[own.begin : own.end].long()
        grad, weight, hidden, score = self.wide(
            self.grad[own.tokens],
            self.weight[own.index],
            self.hidden[own.begin : own.end],
            self.scores.view(-1)[routed],
        )
        grad_activated = grad @ weight
        with torch.enable_grad():
            hidden.requires_grad_()
            gate, up = hidden.chunk(2, dim=1)
            activated = F.silu(gate) * up
            (grad_hidden,) = torch.autograd.grad(activated, hidden, score[:, None] * grad_activated)
        activated = activated.detach()
        return (grad_activated * activated).sum(1), grad_hidden, score[:, None] * activated


class WeightGradient(Matmul):
    """Gradient of a weight, from rows in expert order."""

    def prepare(self) -> None:
        """See `Matmul`."""
        problem = self.case.problem
        by = max(1, self.rows // self.experts) ** -0.5
        self.grad = self.draw(self.rows, problem.height, by=by)
        self.x = self.draw(self.rows, problem.width)

    def launch(self, tile: Tile) -> tuple[Tensor, ...]:
        """See `Matmul`."""
        grad_weight, _ = grouped_mm.grouped_mm_wgrad(
            self.grad, self.x, self.offsets, False, tile=tile
        )
        return (grad_weight,)

    def part(self, outputs: tuple[Tensor, ...], own: Expert) -> tuple[Tensor, ...]:
        """See `Matmul`."""
        return (outputs[0][own.index],)

    def exact(self, own: Expert) -> tuple[Tensor, ...]:
        """See `Matmul`."""
        rows = slice(own.begin, own.end)
        grad, x = self.wide(self.grad[rows], self.x[rows])
        return (grad.t() @ x,)


BY_KIND = {
    "gated": GateUp,
    "rows": Rows,
    "gated_backward": GatedBackward,
    "weights": WeightGradient,
}


def build(case: Case, device: torch.device) -> Matmul:
    """Draws the inputs of a matmul on a device."""
    return BY_KIND[case.problem.kind](case, device)
