"""`swiglu` and its gradient for torch's transforms, which do not support reusing buffers."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor, activation: str, limit: float, alpha: float) -> Tensor:
    """Computes the same as the reference, without in-place operations."""
    wide = gate_up if gate_up.dtype == torch.float64 else gate_up.float()
    gate, up = wide.chunk(2, -1)
    if activation == "swiglu_clamped":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        out = gate * torch.sigmoid(alpha * gate) * (up + 1)
    else:
        out = _ACTIVATIONS[activation](gate) * up
    return out.to(gate_up.dtype)


def swiglu_backward(
    grad: Tensor, gate_up: Tensor, activation: str, limit: float, alpha: float
) -> Tensor:
    """Returns the gradient as computed by autograd, which can differentiate it again."""
    with torch.enable_grad():
        # A view separates the new graph from the existing one, if there is one.
        gate_up = gate_up.view_as(gate_up)
        if not gate_up.requires_grad:
            gate_up.requires_grad_()
        y = swiglu(gate_up, activation, limit, alpha)
        return torch.autograd.grad(y, gate_up, grad, create_graph=True)[0]


_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
