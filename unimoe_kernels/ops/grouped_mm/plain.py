"""`grouped_mm` and its weight gradient for torch's transforms, without in-place writes.

If the offsets can be read, every expert multiplies its own slice. Under `vmap` over the offsets,
under `torch.compile` and on a GPU, every expert multiplies all rows, with those of other experts
set to zero.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def grouped_mm(
    x_ND: Tensor, weight_EFD: Tensor, expert_offsets: Tensor, bias_EF: Tensor | None
) -> Tensor:
    """Multiplies the rows of each expert by its weight; rows of no expert are zero."""
    if x_ND.dtype == torch.float16 and x_ND.device.type == "cpu":
        bias_EF = None if bias_EF is None else bias_EF.float()
        return grouped_mm(x_ND.float(), weight_EFD.float(), expert_offsets, bias_EF).half()

    def product(e: int, rows_ND: Tensor) -> Tensor:
        y_NF = rows_ND @ weights[e].t()
        return y_NF if bias_EF is None else y_NF + bias_EF[e]

    weights = weight_EFD.unbind(0)
    if _can_read(expert_offsets):
        bounds = expert_offsets.tolist()
        parts = [product(e, x_ND[s:t]) for e, (s, t) in enumerate(itertools.pairwise(bounds))]
        parts.append(x_ND.new_zeros(x_ND.shape[0] - bounds[-1], weight_EFD.shape[1]))
        return torch.cat(parts)
    y_NF = x_ND.new_zeros(x_ND.shape[0], weight_EFD.shape[1])
    for e, other_N1 in enumerate(_other_rows(x_ND, expert_offsets)):
        y_NF = torch.where(other_N1, y_NF, product(e, x_ND.masked_fill(other_N1, 0)))
    return y_NF


def grouped_mm_wgrad(
    grad_NF: Tensor, x_ND: Tensor, expert_offsets: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor]:
    """Returns `grad.T @ x` and, with `has_bias`, the sum of `grad` over the rows of each expert."""
    if x_ND.dtype == torch.float16 and x_ND.device.type == "cpu":
        grads = grouped_mm_wgrad(grad_NF.float(), x_ND.float(), expert_offsets, has_bias)
        return grads[0].half(), grads[1].half()
    if _can_read(expert_offsets):
        bounds = itertools.pairwise(expert_offsets.tolist())
        own = [(grad_NF[start:end], x_ND[start:end]) for start, end in bounds]
    else:
        own = [
            (grad_NF.masked_fill(other_N1, 0), x_ND.masked_fill(other_N1, 0))
            for other_N1 in _other_rows(x_ND, expert_offsets)
        ]
    grad_EFD = torch.stack([rows_NF.t() @ rows_ND for rows_NF, rows_ND in own])
    if not has_bias:
        return grad_EFD, x_ND.new_zeros(0, grad_NF.shape[1])
    return grad_EFD, torch.stack([rows_NF.sum(0) for rows_NF, _ in own])


def _can_read(offsets: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(offsets):
        if torch._C._functorch.is_batchedtensor(offsets):
            return False
        offsets = torch._C._functorch.get_unwrapped(offsets)
    return offsets.device.type == "cpu"


def _other_rows(x_ND: Tensor, expert_offsets: Tensor) -> list[Tensor]:
    row_N = torch.arange(x_ND.shape[0], device=x_ND.device)
    bounds = expert_offsets.unbind()
    other = [(row_N < start) | (row_N >= end) for start, end in itertools.pairwise(bounds)]
    return [other_N.unsqueeze(1) for other_N in other]
