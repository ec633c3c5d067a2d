"""`grouped_lora` and its gradient, composed of `grouped_mm`."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from unimoe_kernels import _backends

PARTS = ("grouped_mm",)


def forward(
    backend: str, x: Tensor, lora_A: Tensor, lora_B: Tensor, offsets: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns the update of each row and the products `A x`, which are kept for the backward."""
    grouped_mm = partial(_backends.run, backend, "grouped_mm")
    low_NR = grouped_mm(x, lora_A, offsets, None)
    # The scale is applied to the product of width r rather than F.
    return grouped_mm(low_NR * scale, lora_B, offsets, None), low_NR


def backward(
    backend: str,
    grad_NF: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    low_NR: Tensor,
    offsets: Tensor,
    scale: float,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x (empty unless required), A and B."""
    grouped_mm = partial(_backends.run, backend, "grouped_mm")
    wgrad = partial(_backends.run, backend, "grouped_mm_wgrad")
    grad_B, _ = wgrad(grad_NF, low_NR * scale, offsets, False)
    grad_low_NR = grouped_mm(grad_NF, lora_B.transpose(1, 2), offsets, None) * scale
    grad_A, _ = wgrad(grad_low_NR, x, offsets, False)
    if not needs_x:
        return x.new_empty(0), grad_A, grad_B
    grad_x = grouped_mm(grad_low_NR, lora_A.transpose(1, 2), offsets, None)
    return grad_x, grad_A, grad_B
