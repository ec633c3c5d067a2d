"""Specification of `grouped_mm` and its weight gradient: one matmul per expert.

On a CPU the offsets are read and every expert multiplies its own slice. On a GPU, reading them
would synchronise host and device. bfloat16 therefore uses `torch.nn.functional.grouped_mm` if it
does not synchronise; otherwise every expert multiplies all rows and keeps those that it owns, which
is correct but takes E times the work.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_mm(
    x_ND: Tensor, weight_EFD: Tensor, expert_offsets: Tensor, bias_EF: Tensor | None
) -> Tensor:
    """Multiplies the rows of each expert by its weight; rows of no expert are zero."""
    if x_ND.dtype == torch.float16 and x_ND.device.type == "cpu":
        # Matmul in float16 runs at 0.3 GFLOP/s on CPUs without AVX512-FP16.
        bias_EF = None if bias_EF is None else bias_EF.float()
        return grouped_mm(x_ND.float(), weight_EFD.float(), expert_offsets, bias_EF).half()
    if x_ND.device.type == "cpu":
        return _forward_slices(x_ND, weight_EFD, expert_offsets, bias_EF)
    if _torch_runs_it(x_ND, weight_EFD.shape[1]):
        y_NF = F.grouped_mm(x_ND, weight_EFD.transpose(1, 2), offs=expert_offsets[1:])
    else:
        y_NF = x_ND.new_zeros(x_ND.shape[0], weight_EFD.shape[1])
        for e, owned_N in enumerate(_owned_rows(x_ND, expert_offsets)):
            y_NF = torch.where(owned_N.unsqueeze(1), x_ND @ weight_EFD[e].t(), y_NF)
    row_N = torch.arange(x_ND.shape[0], device=x_ND.device)
    if bias_EF is not None:
        expert_N = torch.searchsorted(expert_offsets[1:].long(), row_N, right=True)
        y_NF = y_NF + bias_EF[expert_N.clamp_(max=bias_EF.shape[0] - 1)]
    return y_NF.masked_fill((row_N >= expert_offsets[-1]).unsqueeze(1), 0)


def grouped_mm_wgrad(
    grad_NF: Tensor, x_ND: Tensor, expert_offsets: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor]:
    """Returns `grad.T @ x` and, with `has_bias`, the sum of `grad` over the rows of each expert."""
    if x_ND.dtype == torch.float16 and x_ND.device.type == "cpu":
        grads = grouped_mm_wgrad(grad_NF.float(), x_ND.float(), expert_offsets, has_bias)
        return grads[0].half(), grads[1].half()
    num_experts = expert_offsets.shape[0] - 1
    grad_EFD = x_ND.new_empty(num_experts, grad_NF.shape[1], x_ND.shape[1])
    grad_bias_EF = x_ND.new_zeros(num_experts if has_bias else 0, grad_NF.shape[1])
    if x_ND.device.type == "cpu":
        return _wgrad_slices(grad_NF, x_ND, expert_offsets, grad_EFD, grad_bias_EF)
    if not has_bias and _torch_runs_it(x_ND, grad_NF.shape[1]):
        grad_EFD = F.grouped_mm(grad_NF.t(), x_ND, offs=expert_offsets[1:])
        # The kernel need not write the gradient of an expert without rows, which is zero.
        return grad_EFD.masked_fill((expert_offsets.diff() == 0).view(-1, 1, 1), 0), grad_bias_EF
    for e, owned_N in enumerate(_owned_rows(x_ND, expert_offsets)):
        owned_N1 = owned_N.unsqueeze(1)
        grad_owned_NF = grad_NF.masked_fill(~owned_N1, 0)
        torch.mm(grad_owned_NF.t(), x_ND.masked_fill(~owned_N1, 0), out=grad_EFD[e])
        if has_bias:
            grad_bias_EF[e] = grad_owned_NF.sum(0)
    return grad_EFD, grad_bias_EF


def _forward_slices(
    x_ND: Tensor, weight_EFD: Tensor, expert_offsets: Tensor, bias_EF: Tensor | None
) -> Tensor:
    y_NF = x_ND.new_empty(x_ND.shape[0], weight_EFD.shape[1])
    bounds = expert_offsets.tolist()
    for e, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start == end:
            continue
        weight_DF = weight_EFD[e].t()
        if bias_EF is None:
            torch.mm(x_ND[start:end], weight_DF, out=y_NF[start:end])
        else:
            torch.addmm(bias_EF[e], x_ND[start:end], weight_DF, out=y_NF[start:end])
    y_NF[bounds[-1] :].zero_()
    return y_NF


def _wgrad_slices(
    grad_NF: Tensor, x_ND: Tensor, expert_offsets: Tensor, grad_EFD: Tensor, grad_bias_EF: Tensor
) -> tuple[Tensor, Tensor]:
    bounds = expert_offsets.tolist()
    for e, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start == end:
            grad_EFD[e].zero_()
            continue
        torch.mm(grad_NF[start:end].t(), x_ND[start:end], out=grad_EFD[e])
        if len(grad_bias_EF):
            torch.sum(grad_NF[start:end], 0, out=grad_bias_EF[e])
    return grad_EFD, grad_bias_EF


def _owned_rows(x_ND: Tensor, expert_offsets: Tensor) -> list[Tensor]:
    row_N = torch.arange(x_ND.shape[0], device=x_ND.device)
    bounds = expert_offsets.unbind()
    return [(row_N >= start) & (row_N < end) for start, end in itertools.pairwise(bounds)]


def _torch_runs_it(x_ND: Tensor, width: int) -> bool:
    # Before sm_90 torch falls back to a loop that synchronises with the device. Strides of its
    # operands must be multiples of 16 bytes, which is eight bfloat16 elements.
    return (
        x_ND.device.type == "cuda"
        and x_ND.dtype == torch.bfloat16
        and x_ND.shape[0] > 0
        and x_ND.shape[1] % 8 == 0
        and width % 8 == 0
        and torch.cuda.get_device_capability(x_ND.device) >= (9, 0)
    )
