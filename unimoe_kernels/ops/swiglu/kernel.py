"""Triton kernels of `swiglu` and its gradient: each program takes a few rows and columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unimoe_kernels._triton.activation import activate, activate_backward, gate_constants
from unimoe_kernels._triton.launch import accumulator

MAX_BLOCK_F = 1024
BLOCK_ELEMENTS = 2048  # of a program: 16 elements a thread with 4 warps, not tuned on a GPU


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_kernel(
    gate_up_ptr,
    out_ptr,
    num_rows,
    width,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Writes `act(gate) * up`."""
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (row < num_rows)[:, None] & (column < width)[None, :]
    gate_ptrs = gate_up_ptr + row[:, None] * (2 * width) + column[None, :]
    gate = tl.load(gate_ptrs, mask=mask, other=0).to(ACC)
    up = tl.load(gate_ptrs + width, mask=mask, other=0).to(ACC)
    out = activate(gate, up, ACTIVATION, LIMIT, ALPHA).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * width + column[None, :], out, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_backward_kernel(
    grad_ptr,
    gate_up_ptr,
    grad_gate_up_ptr,
    num_rows,
    width,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Writes the gradients of gate and up."""
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (row < num_rows)[:, None] & (column < width)[None, :]
    address = row[:, None] * (2 * width) + column[None, :]
    gate = tl.load(gate_up_ptr + address, mask=mask, other=0).to(ACC)
    up = tl.load(gate_up_ptr + address + width, mask=mask, other=0).to(ACC)
    grad_ptrs = grad_ptr + row[:, None] * width + column[None, :]
    grad = tl.load(grad_ptrs, mask=mask, other=0).to(ACC)
    grad_gate, grad_up = activate_backward(grad, gate, up, ACTIVATION, LIMIT, ALPHA)
    dtype = grad_gate_up_ptr.dtype.element_ty
    tl.store(grad_gate_up_ptr + address, grad_gate.to(dtype), mask=mask)
    tl.store(grad_gate_up_ptr + address + width, grad_up.to(dtype), mask=mask)


def swiglu(gate_up: Tensor, activation: str, limit: float, alpha: float) -> Tensor:
    """Activates contiguous rows; see `ops/swiglu/op.py`."""
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    _launch(swiglu_kernel, (gate_up, out), *out.shape, activation, limit, alpha)
    return out


def swiglu_backward(
    grad: Tensor, gate_up: Tensor, activation: str, limit: float, alpha: float
) -> Tensor:
    """Returns the gradient in contiguous rows."""
    grad_gate_up = gate_up.new_empty(gate_up.shape)
    tensors = (grad, gate_up, grad_gate_up)
    _launch(swiglu_backward_kernel, tensors, *grad.shape, activation, limit, alpha)
    return grad_gate_up


def _launch(
    kernel: triton.JITFunction,
    tensors: tuple[Tensor, ...],
    num_rows: int,
    width: int,
    activation: str,
    limit: float,
    alpha: float,
) -> None:
    if num_rows == 0 or width == 0:
        return
    block_f = min(triton.next_power_of_2(width), MAX_BLOCK_F)
    block_n = BLOCK_ELEMENTS // block_f
    with torch.cuda.device_of(tensors[0]):
        kernel[(triton.cdiv(num_rows, block_n), triton.cdiv(width, block_f))](
            *tensors,
            num_rows,
            width,
            **gate_constants((activation, limit, alpha)),
            ACC=accumulator(tensors[0].dtype),
            BLOCK_N=block_n,
            BLOCK_F=block_f,
        )
