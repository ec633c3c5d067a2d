"""Muon with a configurable dtype, which orthogonalises matrices of equal shape in one batch.

`torch.optim.Muon` always multiplies in bfloat16, one matrix at a time.
"""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from unimoe_kernels.distributed import collective

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_EPSILON = 1e-7


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Replaces the singular values of matrices by values near 1.

    Runs five steps of a quintic Newton-Schulz iteration, whose coefficients bring singular values
    quickly to about 0.7 to 1.2 instead of exactly to 1.

    Args:
        matrices: `[n, rows, columns]`.
        dtype: dtype of the multiplications.

    Returns:
        `[n, rows, columns]` in `dtype`.

    Reference: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.to(dtype)
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(_EPSILON)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """The Muon optimiser, which steps along the orthogonalised momentum of each matrix.

    Args:
        params: matrices `[rows, columns]`.
        lr: learning rate; a step is `lr * sqrt(max(1, rows / columns))` times an orthogonal matrix.
        momentum: coefficient of the running mean of gradients (Nesterov momentum).
        weight_decay: decoupled weight decay: each step scales parameters by
            `1 - lr * weight_decay`.
        dtype: dtype of the multiplications of `orthogonalize`.

    Raises:
        ValueError: If a parameter is not a matrix.

    Reference: arXiv 2502.16982.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() != 2:
                    raise ValueError(
                        f"params (shape {list(parameter.shape)}) must be matrices [rows, columns]"
                    )
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        """Performs one step; parameters without gradient are unchanged.

        Args:
            closure: recomputes and returns the loss; optional.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                directions = [_whole(self._direction(p, group)) for p in parameters]
                directions = orthogonalize(torch.stack(directions), self._dtype)
                directions = directions.to(parameters[0].dtype)
                step = group["lr"] * math.sqrt(max(1, shape[0] / shape[1]))
                parts = [_part(d, p) for d, p in zip(directions, parameters, strict=True)]
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, parts, alpha=-step)
        return loss

    def _direction(self, parameter: nn.Parameter, group: dict) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        mean = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
        return parameter.grad.lerp(mean, group["momentum"])


def _whole(direction: Tensor) -> Tensor:
    """Gathers a direction that may be sharded over processes."""
    if not isinstance(direction, DTensor):
        return direction
    with collective("direction of Muon"):
        return direction.full_tensor()


def _part(direction: Tensor, parameter: nn.Parameter) -> Tensor:
    """Shards a direction like its parameter."""
    if not isinstance(parameter, DTensor):
        return direction
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(direction, mesh, placements, src_data_rank=None)
