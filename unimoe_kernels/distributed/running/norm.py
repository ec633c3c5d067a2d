"""The norm of gradients whose parts lie on different ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from unimoe_kernels.distributed.running.failure import collective


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float, eps: float = 1e-6) -> Tensor:
    """Scales gradients down to a norm over all ranks, like `torch.nn.utils.clip_grad_norm_`.

    Parts of a DTensor are counted where they lie, and what all ranks hold is counted once. Every
    rank must call it with the same parameters.

    Args:
        parameters: plain tensors, DTensors or both, on any meshes; those without a gradient are
            left out.
        max_norm: the 2-norm that gradients get if theirs is larger.
        eps: added to the norm they are divided by, as torch does.

    Returns:
        The norm before, `()`, float32 (float64 if a gradient is), equal on all ranks.

    Raises:
        ValueError: If max_norm is not above 0.
        CollectiveError: If a rank does not take part.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm ({max_norm}) must be above 0")
    parameters = list(parameters)
    if not parameters:
        return torch.zeros(())
    wide = any(p.dtype == torch.float64 for p in parameters)
    dtype = torch.float64 if wide else torch.float32
    device = parameters[0].device
    squares: dict[tuple[DeviceMesh, tuple[int, ...]] | None, Tensor] = {}
    # Every kind of part is added up on every rank, also where a rank has no gradient of the kind.
    for parameter in parameters:
        key = _split_over(parameter)
        if key not in squares:
            squares[key] = torch.zeros((), dtype=dtype, device=device)
        if parameter.grad is not None:
            grad = parameter.grad
            local = grad.to_local() if isinstance(grad, DTensor) else grad
            squares[key] += torch.linalg.vector_norm(local, dtype=dtype).square()
    for key, square in squares.items():
        if key is None:
            continue
        mesh, dims = key
        for dim in dims:
            with collective("gradient norm"):
                dist.all_reduce(square, group=mesh.get_group(dim))
    norm = torch.stack(list(squares.values())).sum().sqrt()
    factor = (max_norm / (norm + eps)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            grad = parameter.grad
            local = grad.to_local() if isinstance(grad, DTensor) else grad
            local.mul_(factor.to(local))
    return norm


def _split_over(parameter: Tensor) -> tuple[DeviceMesh, tuple[int, ...]] | None:
    """The mesh and those of its dimensions that split the parameter; None if none does."""
    if not isinstance(parameter, DTensor):
        return None
    dims = tuple(
        dim
        for dim, placement in enumerate(parameter.placements)
        if not placement.is_replicate() and parameter.device_mesh.size(dim) > 1
    )
    return (parameter.device_mesh, dims) if dims else None
