"""Specification of `swiglu` and its gradient.

Buffers are reused if possible: on a CPU, the first access to new memory takes as long as the
arithmetic.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor, activation: str, limit: float, alpha: float) -> Tensor:
    """Multiplies the activated gate half by the up half, in at least float32."""
    gate, up = _halves(gate_up)
    if activation == "swiglu_clamped":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        out = gate.mul_(torch.sigmoid(alpha * gate)).mul_(up + 1)
    else:
        out = _ACTIVATIONS[activation](gate).mul_(up)
    return out.to(gate_up.dtype).contiguous()


def swiglu_backward(
    grad: Tensor, gate_up: Tensor, activation: str, limit: float, alpha: float
) -> Tensor:
    """Returns the gradient of `swiglu` with respect to `gate_up`."""
    gate, up = _halves(gate_up)
    grad = grad.to(gate.dtype)
    grad_gate_up = gate.new_empty(gate_up.shape)
    grad_gate, grad_up = grad_gate_up.chunk(2, -1)
    if activation == "swiglu_clamped":
        gate_open, up_open = gate <= limit, (up >= -limit) & (up <= limit)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        sigmoid = torch.sigmoid(alpha * gate)
        slope = sigmoid * (1 + alpha * gate * (1 - sigmoid))
        # Masked rather than multiplied by 0: gradients of clamped elements may be NaN or infinite.
        grad_gate.copy_((grad * (up + 1) * slope).masked_fill_(~gate_open, 0))
        grad_up.copy_((grad * gate * sigmoid).masked_fill_(~up_open, 0))
    else:
        activated = _ACTIVATIONS[activation](gate)
        torch.mul(grad, activated, out=grad_up)
        grad_activated = torch.mul(grad, up, out=activated)
        _BACKWARDS[activation](grad_activated, gate, grad_input=grad_gate)
    return grad_gate_up.to(gate_up.dtype)


def _halves(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    if gate_up.dtype in (torch.bfloat16, torch.float16):
        gate_up = gate_up.float()
    return gate_up.chunk(2, -1)


_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
_BACKWARDS = {
    "silu": torch.ops.aten.silu_backward.grad_input,
    "gelu": torch.ops.aten.gelu_backward.grad_input,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward.grad_input, approximate="tanh"),
    "relu": partial(torch.ops.aten.threshold_backward.grad_input, threshold=0),
}
