"""Triton kernels of `swiglu` and its gradient: each program computes a few rows and columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unimoe_kernels._triton.activation import activate, activate_backward, gate_constants
from unimoe_kernels._triton.halves import load_halves, store_halves
from unimoe_kernels._triton.launch import accumulator
from unimoe_kernels._triton.planned import Launch, Place, place_of, planned

MAX_BLOCK_N = 1024
BLOCK_ELEMENTS = 2048  # per program: 16 elements per thread with 4 warps; not tuned on a GPU


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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Writes `act(gate) * up`."""
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_mn = (offs_m < num_rows)[:, None] & (offs_n < width)[None, :]
    gate_MN, up_MN = load_halves(gate_up_ptr, offs_m, offs_n, width, mask_mn, ACC)
    out_MN = activate(gate_MN, up_MN, ACTIVATION, LIMIT, ALPHA).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_m[:, None] * width + offs_n[None, :], out_MN, mask=mask_mn)


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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Writes the gradients of gate and up."""
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_mn = (offs_m < num_rows)[:, None] & (offs_n < width)[None, :]
    gate_MN, up_MN = load_halves(gate_up_ptr, offs_m, offs_n, width, mask_mn, ACC)
    grad_ptrs = grad_ptr + offs_m[:, None] * width + offs_n[None, :]
    grad_MN = tl.load(grad_ptrs, mask=mask_mn, other=0).to(ACC)
    grad_gate_MN, grad_up_MN = activate_backward(grad_MN, gate_MN, up_MN, ACTIVATION, LIMIT, ALPHA)
    store_halves(grad_gate_up_ptr, grad_gate_MN, grad_up_MN, offs_m, offs_n, width, mask_mn)


def swiglu(gate_up: Tensor, activation: str, limit: float, alpha: float) -> Tensor:
    """Activates contiguous rows; see `ops/swiglu/op.py`."""
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    _launch(swiglu_kernel, (gate_up, out), out.shape, (activation, limit, alpha))
    return out


def swiglu_backward(
    grad: Tensor, gate_up: Tensor, activation: str, limit: float, alpha: float
) -> Tensor:
    """Returns the gradient with respect to contiguous rows."""
    grad_gate_up = gate_up.new_empty(gate_up.shape)
    tensors = (grad, gate_up, grad_gate_up)
    _launch(swiglu_backward_kernel, tensors, grad.shape, (activation, limit, alpha))
    return grad_gate_up


def _launch(
    kernel: triton.JITFunction,
    tensors: tuple[Tensor, ...],
    shape: torch.Size,
    gate: tuple[str, float, float],
) -> None:
    if shape.numel():
        _plan(place_of(tensors[0]), kernel, shape, gate, tensors[0].dtype)(*tensors)


@planned
def _plan(
    place: Place,
    kernel: triton.JITFunction,
    shape: torch.Size,
    gate: tuple[str, float, float],
    dtype: torch.dtype,
) -> Launch:
    num_rows, width = shape
    block_n = min(triton.next_power_of_2(width), MAX_BLOCK_N)
    block_m = BLOCK_ELEMENTS // block_n
    return Launch(
        place,
        kernel,
        (triton.cdiv(num_rows, block_m), triton.cdiv(width, block_n)),
        (num_rows, width),
        {
            **gate_constants(gate),
            "ACC": accumulator(dtype),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
        },
    )
