"""The norm of gradients that are distributed over ranks."""

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
    """Clips the norm of gradients over all ranks, like `torch.nn.utils.clip_grad_norm_`.

    Each part of a DTensor is counted on its rank, and replicated gradients are counted once. Every
    rank must call this function with the same parameters.

    Args:
        parameters: plain tensors, DTensors or both, on any meshes; those without a gradient are
            skipped.
        max_norm: maximum 2-norm of all gradients together.
        eps: added to the norm before dividing by it, as in torch.

    Returns:
        The norm before clipping, `()`, float32 (float64 if a gradient is), equal on all ranks.

    Raises:
        ValueError: If max_norm is not above 0.
        CollectiveError: If a rank does not participate.
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
    # Every rank joins the sum of every kind of part, even if it has no gradient of that kind.
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
    """Returns the mesh and the mesh dimensions that shard the parameter, or None."""
    if not isinstance(parameter, DTensor):
        return None
    dims = tuple(
        dim
        for dim, placement in enumerate(parameter.placements)
        if not placement.is_replicate() and parameter.device_mesh.size(dim) > 1
    )
    return (parameter.device_mesh, dims) if dims else None
